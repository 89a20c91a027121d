"""What DistillKit captures: Parquet with `input_ids`, and bytes for the ids and log-probabilities at each position.

How the bytes lie is said by its `compression_config.yaml`, which it writes beside the files.  Per position, one behind
the other: `exact_k` numbers; the coefficients of a curve through the other k − exact_k; for each of `residual_bins` a
scale and integers of `element_bits` bits, most significant first, that correct the curve.  Ids take ⌈log2 d⌉ bits
each.  Under `delta_encoding` each number is the difference from the one before.

Exact numbers come back as they were.  A curve is what it is: with its recommended settings numbers are off by a nat and
more, and lists may add up to more than one.  In fp32 as there, but sums of terms may differ in their last digits.

Shapes: L lists of a row, K entries of a list.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from shared.config import Settings
from shared.errors import RecordError
from shared.exchange.lists import ForeignRow, Ragged, flat, rows_of
from shared.rows import Float32

CONFIG_NAME = "compression_config.yaml"
PACKED = ("compressed_logprobs", "bytepacked_indices")
LEGACY = ("packed_indices", "exact_values", "coeffs")
COLUMNS = ("input_ids", "labels", "attention_mask", *PACKED, *LEGACY)
OFFSET = 1
IGNORED = -100

Number = Literal["float16", "bfloat16", "float32", "float64"]
WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class ResidualBin(Settings):
    """Some of the residuals, as integers times a scale."""

    scale_dtype: Number
    element_bits: int = Field(ge=1, le=32)
    num_elements: int = Field(ge=1)

    @property
    def size_bytes(self) -> int:
        return WIDTH[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


class Packing(Settings):
    """DistillKit's `DistributionQuantizationConfig`."""

    d: int = Field(ge=1)
    """Ids lie below it."""
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: Number = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Literal["float16", "float32", "float64"] = "float32"
    residual_bins: list[ResidualBin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "Packing":
        others = self.k - self.exact_k
        if others < 0 or sum(each.num_elements for each in self.residual_bins) > others:
            raise ValueError("exact_k and residual_bins hold more than k numbers")
        if others and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("exact_k is less than k, and nothing says what the other numbers are")
        return self

    @property
    def id_bits(self) -> int:
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def logprob_bytes(self) -> int:
        terms = WIDTH[self.term_dtype] * len(self.polynomial_terms or [])
        return self.exact_k * WIDTH[self.exact_dtype] + terms + sum(each.size_bytes for each in self.residual_bins)

    @property
    def id_bytes(self) -> int:
        return -(-self.k * self.id_bits // 8)


def read(
    fields: Mapping[str, Any], where: str, sample_id: str, source: str, *, packing: Packing, vocab_size: int
) -> list[ForeignRow]:
    """The rows of a record; without `labels` every token is supervised.

    Raises:
        RecordError: a column is missing, or the bytes are not as the config says.
    """
    if any(fields.get(name) is not None for name in LEGACY):
        raise RecordError(
            f"{where}: holds {' and '.join(LEGACY)}: DistillKit's legacy form, which stores centred logits",
            next_step="capture again: what they add up to was not stored, so they are no log-probabilities",
        )
    if lacking := [name for name in ("input_ids", *PACKED) if fields.get(name) is None]:
        raise RecordError(f"{where}: has no {' and no '.join(lacking)}", next_step="give DistillKit's Parquet files")
    input_ids_L = flat(fields["input_ids"], where)
    logprob_bytes = _bytes(fields["compressed_logprobs"], packing.logprob_bytes, f"{where}: compressed_logprobs")
    id_bytes = _bytes(fields["bytepacked_indices"], packing.id_bytes, f"{where}: bytepacked_indices")
    num_lists, num_tokens = len(id_bytes), len(input_ids_L)
    if len(logprob_bytes) != num_lists or not num_tokens - 1 <= num_lists <= num_tokens:
        raise RecordError(f"{where}: {num_tokens} tokens, {len(logprob_bytes)} and {num_lists} lists")
    counts_L = np.zeros(num_tokens, dtype=np.int32)  # the last token predicts nothing that was captured
    counts_L[:num_lists] = packing.k
    labels, mask = fields.get("labels"), fields.get("attention_mask")
    return rows_of(
        where,
        sample_id,
        source,
        input_ids_L=input_ids_L,
        is_label_L=np.ones(num_tokens, bool) if labels is None else flat(labels, where) >= 0,
        parts_L=np.ones(num_tokens) if mask is None else flat(mask, where),
        counts_L=counts_L,
        ids_E=unpacked(id_bytes, packing.id_bits, packing.k).ravel(),
        logp_E=logprobs(logprob_bytes, packing).astype(np.float64).ravel(),
        vocab_size=vocab_size,
    )


def logprobs(data_LB: Any, packing: Packing) -> Float32:
    """Log-probabilities [L, K] of bytes [L, B]."""
    taken, num_lists = 0, len(data_LB)

    def take(size_bytes: int) -> Any:
        nonlocal taken
        taken += size_bytes
        return np.ascontiguousarray(data_LB[:, taken - size_bytes : taken])

    exact_LK = _numbers(take(packing.exact_k * WIDTH[packing.exact_dtype]), packing.exact_dtype)
    num_others, terms = packing.k - packing.exact_k, packing.polynomial_terms or []
    coefficients_LT = _numbers(take(len(terms) * WIDTH[packing.term_dtype]), packing.term_dtype)
    others_LK = np.zeros((num_lists, num_others), dtype=np.float32)
    begin = 0
    for each in packing.residual_bins:
        scale_L1 = _numbers(take(WIDTH[each.scale_dtype]), each.scale_dtype)
        steps_LK = unpacked(take(each.size_bytes - WIDTH[each.scale_dtype]), each.element_bits, each.num_elements)
        lowest = -(1 << (each.element_bits - 1))
        levels_LK = 2 * steps_LK - 1 if each.element_bits == 1 else steps_LK + lowest
        others_LK[:, begin : begin + each.num_elements] = levels_LK.astype(np.float32) * scale_L1
        begin += each.num_elements
    others_LK = _as_stored(others_LK, packing.exact_dtype)
    if terms:
        curve_KT = _curve(num_others, packing).astype(coefficients_LT.dtype)
        others_LK = others_LK + (curve_KT[None] * coefficients_LT[:, None]).sum(axis=2)
    values_LK = np.concatenate([exact_LK, others_LK], axis=1)
    if packing.delta_encoding:
        values_LK = _as_stored(np.cumsum(values_LK.astype(np.float32), axis=1), packing.exact_dtype)
    return values_LK.astype(np.float32)


def unpacked(data_LB: Any, bits: int, count: int) -> Any:
    """Whole numbers [L, count] of so many bits each, the most significant first."""
    bits_LN = np.unpackbits(data_LB, axis=1, count=bits * count).reshape(len(data_LB), count, bits)
    return bits_LN @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _curve(num_points: int, packing: Packing) -> Any:
    """Each term at each point [K, T]."""
    dtype = np.dtype(packing.term_dtype)
    points_K = np.linspace(0, 1, num_points) if packing.normalize_t else np.arange(num_points)
    points_K = points_K.astype(dtype)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    terms = packing.polynomial_terms or []
    return np.stack([special[t](points_K) if isinstance(t, str) else points_K**t for t in terms], axis=1)


def _numbers(data_LB: Any, dtype: str) -> Any:
    if dtype != "bfloat16":
        return data_LB.view(np.dtype(dtype).newbyteorder("<"))
    return (data_LB.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _as_stored(values: Any, dtype: str) -> Any:
    """Rounded to that type, ties to even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _bytes(value: Any, size_bytes: int, where: str) -> Any:
    rows = Ragged.of(value, where)
    if wrong := set(rows.counts_L.tolist()) - {size_bytes}:
        raise RecordError(
            f"{where}: expected {size_bytes} bytes for a position, got {min(wrong)}",
            next_step=f"give the {CONFIG_NAME} that the files were captured with",
        )
    return rows.values_E.astype(np.uint8).reshape(-1, size_bytes)
