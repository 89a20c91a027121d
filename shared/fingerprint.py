"""Fingerprints: what must be equal for two things to belong together.

A tokenizer is its vocabulary and merges, never its size: models of one size with other tokenizers are common,
and so are models of one tokenizer with padded, unequal sizes.
"""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer

from shared.errors import ForeignTokenizerError
from shared.rows import Row

TRAIN_ANOTHER = "train a student that has the teacher's tokenizer, or dump with a teacher that has the student's"


def sha256_of_json(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


class RowsDigest:
    """Tells whether rows, in their order, are what they were; what a teacher said of them has no part in it."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, row: Row) -> None:
        for part in (
            row.sample_id.encode(),
            row.source.encode(),
            row.input_ids_L.tobytes(),
            row.label_mask_L.tobytes(),
        ):
            self._digest.update(len(part).to_bytes(8, "big") + part)

    def text(self) -> str:
        return self._digest.hexdigest()


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over every token with its id, and the merges in order."""
    model = json.loads(tokenizer.to_str())["model"]
    # Merges are "a b" in old files and ["a", "b"] in new ones; a token may itself hold a space.
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    return sha256_of_json({"tokens": _tokens_by_id(tokenizer), "merges": merges})


def require_same_tokenizer(
    expected: Tokenizer, got: Tokenizer, *, expected_name: str, got_name: str, next_step: str = TRAIN_ANOTHER
) -> None:
    """Refuse a tokenizer that would give the dataset's ids another meaning.

    Raises:
        ForeignTokenizerError: with both fingerprints and the first token that differs.
    """
    fingerprints = tokenizer_fingerprint(expected), tokenizer_fingerprint(got)
    if fingerprints[0] == fingerprints[1]:
        return
    raise ForeignTokenizerError(
        f"the tokenizers differ: {expected_name} has {fingerprints[0][:16]}…, {got_name} has {fingerprints[1][:16]}…; "
        + _first_difference(_tokens_by_id(expected), _tokens_by_id(got)),
        next_step=next_step,
    )


def _tokens_by_id(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    return sorted((token_id, token) for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items())


def _first_difference(expected: list[tuple[int, str]], got: list[tuple[int, str]]) -> str:
    for (id_a, token_a), (id_b, token_b) in zip(expected, got, strict=False):
        if (id_a, token_a) != (id_b, token_b):
            return f"first at id {min(id_a, id_b)}: {token_a!r} (id {id_a}) against {token_b!r} (id {id_b})"
    if len(expected) != len(got):
        return f"they agree on {min(len(expected), len(got))} tokens, then one ends: {len(expected)} against {len(got)}"
    return "the tokens agree, the merges do not"
