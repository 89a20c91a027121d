"""Tokenizers of one family: made from one that is there, with tokens moved, left out or added."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer

FILE = "tokenizer.json"


def edited(tokenizer: Tokenizer, change: Any) -> Tokenizer:
    """With its JSON changed in place."""
    tree = json.loads(tokenizer.to_str())
    change(tree)
    return Tokenizer.from_str(json.dumps(tree))


def moved(tokenizer: Tokenizer, seed: int = 0) -> Tokenizer:
    """With all ids shuffled."""

    def shuffle(tree: Any) -> None:
        vocabulary = tree["model"]["vocab"]
        ids = np.random.default_rng(seed).permutation(sorted(vocabulary.values()))
        new = dict(zip(sorted(vocabulary.values()), ids.tolist(), strict=True))
        tree["model"]["vocab"] = {token: new[token_id] for token, token_id in vocabulary.items()}
        for token in tree["added_tokens"]:
            token["id"] = new.get(token["id"], token["id"])
        tree["added_tokens"].sort(key=lambda token: token["id"])

    return edited(tokenizer, shuffle)


def shortened(tokenizer: Tokenizer, num_merges: int) -> Tokenizer:
    """Without its last merges and the tokens that they make."""

    def shorten(tree: Any) -> None:
        for left, right in tree["model"]["merges"][-num_merges:]:
            del tree["model"]["vocab"][left + right]
        del tree["model"]["merges"][-num_merges:]

    return edited(tokenizer, shorten)


def extended(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    """With more added tokens, that are not special."""
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return other


def give_tokenizer(folder: Path, tokenizer: Tokenizer, like: Any) -> Any:
    """Save it in a model's folder, with the special tokens and template of another."""
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=like.eos_token,
        pad_token=like.pad_token,
        extra_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = like.chat_template
    wrapped.save_pretrained(folder)
    return wrapped


def with_moved_rows(model: Path, folder: Path, new_ids: dict[int, int]) -> Path:
    """The same model for ids that are moved."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model)
    order = torch.arange(loaded.config.vocab_size)
    order[list(new_ids.values())] = torch.tensor(list(new_ids))
    with torch.no_grad():
        for matrix in (loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight):
            matrix.copy_(matrix[order].clone())
    loaded.save_pretrained(folder)
    return folder
