"""Small real things for tests: a trained byte-level tokenizer with a ChatML template, and models of a few families.

Nothing here is mocked: files are written as a Hub repository has them and loaded by the code under test.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.chat_templates import CHATML

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "system user assistant",
    "What is two plus three? It is five.",
    "Tell me a story about a red fox and a blue bird.",
    "Once upon a time the fox met the bird, and they counted to ten: 1 2 3 4 5 6 7 8 9 10.",
]


def make_tokenizer(
    folder: Path,
    *,
    vocab_size: int = 300,
    template: str = CHATML,
    sentences: Any = SENTENCES,
    control: Any = (),
    added: Any = (),
) -> Any:
    """Train, save and load a tokenizer; `control` are more special tokens, `added` are added ones that are not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", *control],
    )
    wrapped.add_tokens([AddedToken(token, normalized=False) for token in added])
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def make_spaced_tokenizer(kind: str, *, template: str, control: Any) -> Any:
    """In the manner of SentencePiece: spaces are part of tokens, and one is put before what begins a text.

    `kind` is first (before the text alone) or legacy (behind every control token as well, as Llama 2 has it).
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *strip])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", *SPECIAL_TOKENS, *control]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, "five  five\n\nfive"] * 5, trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    named = {"eos_token": "<|im_end|>", "unk_token": "<unk>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.chat_template = template
    return wrapped


SHAPE: dict[str, Any] = {
    "vocab_size": 307,  # odd on purpose, and larger than the tokenizer: the usual padded case
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2_softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12}),
    "cohere_scale": ("Cohere", {"logit_scale": 0.25}),
    "granite_scale": ("Granite", {"logits_scaling": 4.0}),
    "phi_bias": ("Phi", {"num_key_value_heads": 2}),
}


def make_model(folder: Path, *, family: str = "qwen2", seed: int = 0, spread: float = 0.5, **changes: Any) -> Path:
    """Save a randomly initialised model; `spread` scales its matrices, so that it has opinions."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **extra, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=spread / parameter.shape[-1] ** 0.25) if parameter.ndim == 2 else None
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    model.save_pretrained(folder)
    return folder
