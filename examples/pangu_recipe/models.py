"""A tokenizer made from the teacher's corpus, and a teacher and a student that know nothing yet.

The folders are what `AutoTokenizer` and `AutoModelForCausalLM` load.  The chat template has Qwen3's switch:
with `enable_thinking: false` the prompt ends in reasoning that is empty, and so the answer follows at once.

    python models.py CORPUS FOLDER [SEED]    writes FOLDER/tokenizer, FOLDER/teacher and FOLDER/student
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
)

PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen2's own: `AutoTokenizer` takes the class from the model's type, and that class brings its pre-tokenizer along.
# It has every digit stand alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THINKING = ("<think>", "</think>")
VOCABULARY = 8_192
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """How big a model is."""

    width: int
    layers: int
    heads: int
    feed_forward: int


TEACHER = Shape(width=192, layers=4, heads=6, feed_forward=384)
STUDENT = Shape(width=32, layers=3, heads=4, feed_forward=96)
TINY_TEACHER = Shape(width=32, layers=2, heads=2, feed_forward=64)
TINY_STUDENT = Shape(width=16, layers=1, heads=2, feed_forward=32)


def corpus_texts(path: Path) -> Iterator[str]:
    """The roles and contents of all messages."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield from (f"{message['role']}\n{message['content']}" for message in json.loads(line)["messages"])


def make_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Qwen2TokenizerFast:
    """A byte-level BPE in which every digit stands alone, with ChatML's tokens and those of thinking."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(THINKING),
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in THINKING])
    tokenizer = Qwen2TokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, add_prefix_space=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2TokenizerFast, shape: Shape, seed: int) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights; the same seed gives the same ones."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        # Rows are short: the usual 10,000 leaves most of a narrow head without places.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        initializer_range=shape.width**-0.5,  # the usual 0.02 suits wide models; narrow ones learn slowly from it
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    return model


def write_models(
    corpus: Path,
    folder: Path,
    seed: int = 0,
    teacher: Shape = TEACHER,
    student: Shape = STUDENT,
    *,
    tokenizer_of: Path | None = None,
) -> dict[str, Path]:
    """Tokenizer, teacher and student below `folder`.

    The teacher's corpus is what the tokenizer learns from, unless there is one already, at `tokenizer_of`.
    """
    paths = {name: folder / name for name in ("tokenizer", "teacher", "student")}
    if tokenizer_of is None:
        tokenizer = make_tokenizer(corpus_texts(corpus / "teacher.jsonl"))
    else:
        tokenizer = Qwen2TokenizerFast.from_pretrained(tokenizer_of)
    tokenizer.save_pretrained(paths["tokenizer"])
    for name, shape, model_seed in (("teacher", teacher, seed), ("student", student, seed + 1)):
        make_model(tokenizer, shape, model_seed).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


if __name__ == "__main__":
    corpus_folder, models_folder, *seeds = sys.argv[1:]
    for written in write_models(Path(corpus_folder), Path(models_folder), seed=int(seeds[0]) if seeds else 0).values():
        print(written)
