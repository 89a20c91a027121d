"""Attention that stays within the documents of a packed line.

- `varlen`: ours, one scaled_dot_product_attention for each document of a single line.  Costs Σ L² and no padding; runs
  wherever torch does, but meets a new shape with every document.
- `flash_attention_2`: transformers' variable-length kernels, flash-attn's on CUDA and CANN's on Ascend NPU.
- `sdpa`, `eager`: a block-diagonal mask that transformers makes of positions which begin again; costs the square of a
  line's length.  For shapes that never change, and for softcaps.

Models differ in what they hand on to their attention, and some (state spaces, linear attention) carry more than
attention along a line.  So a model is tried on a few packed tokens: what stands in one document may have no influence,
not of a bit, on another, and each must come out as it does alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from shared.device import has_variable_length_kernels
from shared.errors import MismatchError
from student_train.config import AttentionName

logger = logging.getLogger("logitferry")

VARLEN = "logitferry_varlen"
PROBE_LENGTHS = (5, 3, 7)


@dataclass(frozen=True)
class Attention:
    """What keeps documents apart; `name` is None where every row stands alone in its line."""

    name: str | None

    @property
    def takes_one_line(self) -> bool:
        """Whether all documents of a pass stand in one line, for want of anything else or because it costs nothing."""
        return self.name in ("varlen", "flash_attention_2")

    def arguments(self, position_ids_BL: Tensor, document_lengths: Sequence[int]) -> dict[str, Any]:
        """What the model's body is given besides ids; lengths in order, padding included."""
        if self.name is None:
            return {}
        if self.name == "varlen":
            return {"position_ids": position_ids_BL, "document_lengths": tuple(document_lengths)}
        if self.name != "flash_attention_2":
            return {"position_ids": position_ids_BL}
        ends = torch.tensor([0, *document_lengths]).cumsum(0).to(position_ids_BL.device, torch.int32)
        longest = max(document_lengths)
        return {
            "position_ids": position_ids_BL,
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def settle_attention(model: Any, asked: AttentionName, *, is_static: bool) -> Attention:
    """Choose for a model, on its device and in its dtype, and set it there.

    Left to itself it takes the quickest that keeps documents apart in this model, and no packing where none does.

    Raises:
        MismatchError: what was asked for cannot be had, or mixes documents.
    """
    own = model.config._attn_implementation
    expected = _alone(model)
    for name in _candidates(model, own, is_static) if asked == "auto" else [asked]:
        fault = _fault(model, Attention(name), expected)
        if fault is None:
            return Attention(name)
        if asked != "auto":
            raise MismatchError(
                f"student.attention {asked}: {type(model).__name__} cannot be packed with it: {fault}",
                next_step="take student.attention: auto, or packing: false",
            )
        logger.info("attention %s cannot pack %s: %s", name, type(model).__name__, fault)
    model.set_attn_implementation(own)
    logger.info("rows are padded, not packed")
    return Attention(None)


def _candidates(model: Any, own: str, is_static: bool) -> list[str]:
    masked = "eager" if own == "eager" else "sdpa"  # a softcap is applied by eager attention alone
    parameter = next(model.parameters())
    has_kernels = own != "eager" and has_variable_length_kernels(parameter.device, parameter.dtype)
    quick = ["flash_attention_2"] if has_kernels else []
    # A mask costs more than the padding that it saves; where shapes are static there is padding anyway.
    return [*quick, masked] if is_static else [*quick, "varlen"]


def _fault(model: Any, attention: Attention, expected: Tensor) -> str | None:
    """What is wrong with a kind of attention for this model."""
    own, fault = model.config._attn_implementation, None
    try:
        model.set_attn_implementation(VARLEN if attention.name == "varlen" else attention.name)
        got, changed = _packed(model, attention, shift=0), _packed(model, attention, shift=1)
        difference = float((got - expected).norm() / expected.norm())
        first = PROBE_LENGTHS[0]
        if not difference <= max(1e-4, 8 * torch.finfo(next(model.parameters()).dtype).eps):
            fault = f"a document is not what it is alone, relative difference {difference:.1e}"
        elif not torch.equal(got[first:], changed[first:]):
            fault = "a document has an influence on those behind it"
    except Exception as error:  # whatever a model's own code raises for what it does not know
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
    if fault is not None:
        model.set_attn_implementation(own)
    return fault


def _probe_ids(model: Any, shift: int = 0) -> list[Tensor]:
    """Documents of unlike tokens; `shift` changes the first one alone."""
    vocab_size, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    every = torch.arange(sum(PROBE_LENGTHS), device=device) * 7 % vocab_size
    documents = list(every.split(list(PROBE_LENGTHS)))
    return [(documents[0] + shift) % vocab_size, *documents[1:]]


@torch.no_grad()
def _alone(model: Any) -> Tensor:
    with evaluating(model):
        each = [model.base_model(input_ids=ids[None], use_cache=False) for ids in _probe_ids(model)]
    return torch.cat([output.last_hidden_state[0].float() for output in each])


@torch.no_grad()
def _packed(model: Any, attention: Attention, *, shift: int) -> Tensor:
    documents = _probe_ids(model, shift)
    position_ids = torch.cat([torch.arange(len(ids), device=ids.device) for ids in documents])[None]
    with evaluating(model):
        output = model.base_model(
            input_ids=torch.cat(documents)[None],
            use_cache=False,
            **attention.arguments(position_ids, PROBE_LENGTHS),
        )
    return output.last_hidden_state[0].float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def varlen_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    attention_mask: Tensor | None,
    *,
    document_lengths: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, in the form that transformers asks of an attention function.

    G key heads serve H query heads.  Without lengths every line is one document.

    Raises:
        ValueError: there is a mask; documents are all that this knows.
    """
    if attention_mask is not None:
        raise ValueError("variable-length attention takes documents, not a mask")
    parts = []
    splits = [each.split(list(document_lengths or (query_BHLD.shape[2],)), dim=2)
              for each in (query_BHLD, key_BGLD, value_BGLD)]  # fmt: skip
    for query, key, value in zip(*splits, strict=True):
        band = _band(query, key, sliding_window)
        parts.append(
            F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=band,
                is_causal=band is None and query.shape[2] > 1,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _band(query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """The mask of a sliding window: a token sees itself and the window − 1 before it; None where all is within."""
    length = key.shape[2]
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """In the form that transformers asks of a mask function: no more of a mask than the caller's own."""
    return attention_mask


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, _no_mask)
