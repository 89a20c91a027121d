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
from student_train.packing import Shape

logger = logging.getLogger("logitferry")

VARLEN = "logitferry_varlen"
PROBE_LENGTHS = (5, 3, 7)
LINE_MULTIPLE = 64
"""Masked lines are as long as the longest row, rounded up to it."""
CHANGES_ATTENTION = ("softcap", "s_aux", "position_bias", "head_mask")
"""What some models hand to their attention besides queries, keys and values."""


@dataclass(frozen=True)
class Attention:
    """What keeps documents apart; `name` is None where every row stands alone in its line."""

    name: str | None

    @property
    def takes_one_line(self) -> bool:
        """Whether all documents of a pass stand in one line, for want of anything else or because it costs nothing."""
        return self.name in ("varlen", "flash_attention_2")

    def shape(self, batch_tokens: int, longest_row: int, *, is_static: bool) -> Shape:
        """What passes of rows that are no longer look like; static ones need packing."""
        if self.name is None:
            line_tokens = None
        elif self.takes_one_line:
            line_tokens = max(batch_tokens, longest_row) if is_static else batch_tokens
        else:  # whose cost grows with the square of a line's length
            line_tokens = -(-longest_row // LINE_MULTIPLE) * LINE_MULTIPLE
        return Shape(
            batch_tokens=batch_tokens, line_tokens=line_tokens, is_static=is_static and line_tokens is not None
        )

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
    if fault := _never_packed(model):
        if asked != "auto":
            raise MismatchError(f"{type(model).__name__} cannot be packed: {fault}", next_step="set packing: false")
        logger.info("rows are padded, not packed: %s", fault)
        return Attention(None)
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


def _never_packed(model: Any) -> str | None:
    """What a few tokens would not show: rows whose positions are turned by an angle that depends on the longest one."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(each.get("rope_type")) for each in [rope, *rope.values()] if isinstance(each, dict)}
    longest = sorted(kinds & {"dynamic", "longrope"})
    return f"its {longest[0]} positions depend on the longest row of a pass" if longest else None


def _unseen_window(model: Any, windows: Sequence[int | None]) -> str | None:
    """A window or chunk that the model means to apply by a mask alone, which `varlen` does without."""
    config = model.config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        meant = getattr(config, name, None)
        if meant is not None and meant < getattr(config, "max_position_embeddings", meant + 1) and meant not in windows:
            return f"its {name} of {meant} is a mask's"
    return None


def _candidates(model: Any, own: str, is_static: bool) -> list[str]:
    # A mask costs more than the padding that it saves; where shapes are static there is padding anyway.
    if own == "eager":  # the only one that applies a softcap
        return ["eager"] if is_static else []
    parameter = next(model.parameters())
    quick = ["flash_attention_2"] if has_variable_length_kernels(parameter.device, parameter.dtype) else []
    return [*quick, "sdpa" if is_static else "varlen"]


def _fault(model: Any, attention: Attention, expected: Tensor) -> str | None:
    """What is wrong with a kind of attention for this model."""
    own, fault = model.config._attn_implementation, None
    try:
        model.set_attn_implementation(VARLEN if attention.name == "varlen" else attention.name)
        windows: list[int | None] = []
        got, changed = (_packed(model, attention, shift=shift, windows=windows) for shift in (0, 1))
        difference = float((got - expected).norm() / expected.norm())
        first = len(_probe_ids(model)[0])
        if not difference <= max(1e-4, 8 * torch.finfo(next(model.parameters()).dtype).eps):
            fault = f"a document is not what it is alone, relative difference {difference:.1e}"
        elif not torch.equal(got[first:], changed[first:]):
            fault = "a document has an influence on those behind it"
        elif attention.name == "varlen":
            fault = _unseen_window(model, windows)
    except Exception as error:  # whatever a model's own code raises for what it does not know
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
    if fault is not None:
        model.set_attn_implementation(own)
    return fault


def _probe_ids(model: Any, shift: int = 0) -> list[Tensor]:
    """Documents of unlike tokens; `shift` changes the first one alone."""
    vocab_size, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(PROBE_LENGTHS)
    lengths = [min(length, most) for length in PROBE_LENGTHS]
    every = torch.arange(sum(lengths), device=device) * 7 % vocab_size
    documents = list(every.split(lengths))
    return [(documents[0] + shift) % vocab_size, *documents[1:]]


@torch.no_grad()
def _alone(model: Any) -> Tensor:
    with evaluating(model):
        each = [model.base_model(input_ids=ids[None], use_cache=False) for ids in _probe_ids(model)]
    return torch.cat([output.last_hidden_state[0].float() for output in each])


@torch.no_grad()
def _packed(model: Any, attention: Attention, *, shift: int, windows: list[int | None]) -> Tensor:
    documents = _probe_ids(model, shift)
    position_ids = torch.cat([torch.arange(len(ids), device=ids.device) for ids in documents])[None]
    with evaluating(model):
        output = model.base_model(
            input_ids=torch.cat(documents)[None],
            use_cache=False,
            **attention.arguments(position_ids, [len(ids) for ids in documents]),
            **({"windows": windows} if attention.name == "varlen" else {}),
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
    windows: list[int | None] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, in the form that transformers asks of an attention function.

    G key heads serve H query heads.  Without lengths every line is one document.  `windows` takes down which sliding
    windows were asked for.

    Raises:
        ValueError: there is a mask, or something else that changes attention; documents are all that this knows.
    """
    if windows is not None:
        windows.append(sliding_window)
    if unknown := [name for name in CHANGES_ATTENTION if others.get(name) is not None]:
        raise ValueError(f"variable-length attention knows nothing of {unknown[0]}")
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
