"""Output matrix and objective in one: logits live one chunk of positions at a time, never [N, V].

The objective is differentiated by autograd on [n, K] tensors alone.  What it says about the logsumexp off the kept
ids becomes the V-sized part of the gradient in closed form, a scaled softmax off the kept ids:

    dL/dz_v = dL/d(lse_off) · softmax_off(z)_v   off the kept ids
    dL/dz_k = the objective's own derivative     at a kept id;  and likewise, added, at the label

Gradients of hidden states and output matrix are computed chunk by chunk in the forward pass, in place of the logits;
the backward pass only scales them.  The three matrix products run in the dtype of the hidden states, or in that of
autocast; everything else, and the sum of the output matrix's gradient, in fp32.

A chunk has the rows that matrix products want, a block of it those that elementwise operations want: only a block is
ever fp32.  The last chunk is padded to a power of two, so that a device which compiles for shapes meets a handful.

Shapes: N positions, n positions of a chunk, b positions of a block, D hidden, V vocabulary, K kept.
Memory: n × V in the dtype of the products and b × V in fp32 (once more at T ≠ 1, and once under a softcap), plus the
    gradients: [N, D] and, unless it is frozen, [V, D] in fp32; under autocast a copy of the weight in its dtype.
Time: one linear cross-entropy plus gathers of N × K.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from shared.device import block_bytes
from shared.models import OutputHead
from student_train.loss import StudentView, Targets, per_position
from student_train.measures import ENTROPY_STRIDE, NAMES, Measures, measure
from student_train.objective import Objective

CHUNK_BYTES = 320 << 20
CHUNK_ROWS = (256, 2048)
SMALLEST_ROWS = 16
WEIGHT_ROWS = 4096  # of the output matrix's gradient, added to its fp32 sum while they are in the cache


@dataclass(frozen=True, kw_only=True)
class FusedLoss:
    """`total` is differentiable; what was measured on the way is for people."""

    total: Tensor
    measures: Measures

    @property
    def ce(self) -> Tensor:
        """Σ c·CE in nats."""
        return self.measures.sum("ce")

    @property
    def kd(self) -> Tensor:
        """Σ c·D in nats."""
        return self.measures.sum("kd")


def fused_linear_loss(
    hidden_ND: Tensor,
    head: OutputHead,
    targets: Targets,
    objective: Objective,
    *,
    denominator: float,
    chunk_positions: int | None = None,
    detailed: bool = False,
) -> FusedLoss:
    """The objective over N positions, divided by `denominator`: Σ c over all accumulation steps of all ranks.

    Where gradients of ranks are averaged and not summed, pass the mean over ranks of Σ c instead.
    Differentiable once, with respect to the hidden states and to the head's weight and bias; what is frozen costs
    nothing.  `chunk_positions` are the positions whose logits live at once; None takes what fits into 320 MiB, 256 to
    2048.  `detailed` measures the student's entropy everywhere and names its most probable id.

    Raises:
        ValueError: hidden states, weight and targets of unlike sizes; targets made for another temperature or tail;
            products in float16, where a gradient divided by a step's tokens is 0 before a loss scale can save it.
    """
    _require_fitting(hidden_ND, head, targets, objective, denominator, chunk_positions)
    total, values_MN = _FusedLinearLoss.apply(
        hidden_ND,
        head.weight_VD,
        head.bias_V,
        head,
        targets,
        objective,
        denominator,
        chunk_positions,
        torch.is_grad_enabled(),
        detailed,
    )
    return FusedLoss(total=total, measures=Measures(values_MN=values_MN, weight_N=targets.weight_N))


def _require_fitting(
    hidden_ND: Tensor,
    head: OutputHead,
    targets: Targets,
    objective: Objective,
    denominator: float,
    chunk_positions: int | None,
) -> None:
    """By shapes and settings alone, which need not wait for a device."""
    num_positions, hidden_size = len(targets.label_N), head.weight_VD.shape[1]
    if tuple(hidden_ND.shape) != (num_positions, hidden_size):
        raise ValueError(
            f"{num_positions} targets and a weight of {tuple(head.weight_VD.shape)} need hidden states of "
            f"({num_positions}, {hidden_size}), got {tuple(hidden_ND.shape)}"
        )
    expected = None if objective.tail == "none" else objective.temperature
    if targets.num_kept and targets.tail_at != expected:
        raise ValueError(
            f"tail: {objective.tail} at temperature {objective.temperature:g} needs targets with tail_at {expected} "
            f"(None: sampled ids, no tail), got {targets.tail_at}"
        )
    if _product_dtype(hidden_ND) == torch.float16:
        raise ValueError("the fused loss needs bfloat16 or float32 products, got float16: gradients would become 0")
    if denominator <= 0 or (chunk_positions is not None and chunk_positions < 1):
        raise ValueError(
            f"denominator is above 0 and chunk_positions at least 1, got {denominator} and {chunk_positions}"
        )


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        targets: Targets,
        objective: Objective,
        denominator: float,
        chunk_positions: int | None,
        grad_enabled: bool,
        detailed: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = (needed and grad_enabled for needed in ctx.needs_input_grad[:3])
        dtype = _product_dtype(hidden_ND)
        is_tempered = objective.temperature != 1.0 and targets.num_kept > 0
        chunk = _Chunk.of(len(hidden_ND), weight_VD, dtype, num_rows=chunk_positions, is_tempered=is_tempered)
        head = replace(head, weight_VD=weight_VD.to(dtype), bias_V=bias_V)
        d_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and needs_bias else None
        is_differentiated = needs_hidden or needs_weight or needs_bias
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        values: list[Tensor] = []
        for begin, end, num_rows in chunk.runs(len(hidden_ND)):
            hidden_nD = F.pad(hidden_ND[begin:end].to(dtype), (0, 0, 0, num_rows - (end - begin)))
            product_nV = torch.mm(hidden_nD, head.weight_VD.T, out=chunk.product_nV[:num_rows])
            run = targets[begin:end].padded(num_rows)
            for rows in chunk.blocks(num_rows):
                logits_bV = head.finish_(chunk.as_fp32(product_nV[rows]))
                of_block, values_Mb = _differentiate_(
                    logits_bV, head, run[rows], objective, denominator, chunk.tempered_bV, is_differentiated, detailed
                )
                total += of_block
                values.append(values_Mb[:, : max(0, end - begin - rows.start)])
                if d_bias_V is not None:
                    d_bias_V += logits_bV.sum(dim=0)
                if is_differentiated:
                    product_nV[rows] = logits_bV
            if d_hidden_ND is not None:
                d_hidden_ND[begin:end] = torch.mm(product_nV, head.weight_VD)[: end - begin]
            if d_weight_VD is not None:
                _accumulate(d_weight_VD, product_nV, hidden_nD)
        del chunk  # before the gradients are copied into their own dtype
        ctx.gradients = (
            d_hidden_ND,
            None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype),
            None if d_bias_V is None or bias_V is None else d_bias_V.to(bias_V.dtype),
        )
        values_MN = torch.cat(values, dim=1) if values else total.new_zeros(len(NAMES), 0)
        ctx.mark_non_differentiable(values_MN)
        return total, values_MN

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # as under create_graph alone
            raise RuntimeError("the fused loss has no second derivative: a gradient of its gradient would be 0")
        if ctx.gradients is None:
            raise RuntimeError("the fused loss can be differentiated once: its gradients are handed on, not kept")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients)
        return (*scaled, None, None, None, None, None, None, None)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The only memory with V columns, made once for all chunks."""

    product_nV: Tensor
    logits_bV: Tensor | None
    """fp32; None where the products are."""
    tempered_bV: Tensor | None
    """fp32; None at T = 1, or where there is no teacher."""
    block_rows: int

    @staticmethod
    def of(
        num_positions: int, weight_VD: Tensor, dtype: torch.dtype, *, num_rows: int | None, is_tempered: bool
    ) -> "_Chunk":
        vocab_size, device = weight_VD.shape[0], weight_VD.device
        num_rows = rows_of_chunk(num_positions, vocab_size, dtype, asked=num_rows)
        block_rows = rows_of_block(num_rows, vocab_size, device)

        def rows_of_fp32() -> Tensor:
            return torch.empty(block_rows, vocab_size, dtype=torch.float32, device=device)

        return _Chunk(
            product_nV=torch.empty(num_rows, vocab_size, dtype=dtype, device=device),
            logits_bV=None if dtype == torch.float32 else rows_of_fp32(),
            tempered_bV=rows_of_fp32() if is_tempered else None,
            block_rows=block_rows,
        )

    def runs(self, num_positions: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end and padded length of every chunk."""
        num_rows = len(self.product_nV)
        for begin in range(0, num_positions, num_rows):
            end = min(begin + num_rows, num_positions)
            yield begin, end, min(num_rows, _padded_rows(end - begin))

    def blocks(self, num_rows: int) -> Iterator[slice]:
        for begin in range(0, num_rows, self.block_rows):
            yield slice(begin, min(begin + self.block_rows, num_rows))

    def as_fp32(self, product_bV: Tensor) -> Tensor:
        """The product itself where it is fp32, and else a copy that the next block overwrites."""
        return product_bV if self.logits_bV is None else self.logits_bV[: len(product_bV)].copy_(product_bV)


def _differentiate_(
    logits_bV: Tensor,
    head: OutputHead,
    targets: Targets,
    objective: Objective,
    denominator: float,
    tempered_bV: Tensor | None,
    is_differentiated: bool,
    detailed: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of a block and its measures [M, b]; dL/d(hidden @ weightᵀ + bias) in place of the logits where wanted."""
    slope = _head_slope(head, logits_bV)  # while the logits are still whole
    label_b1 = targets.label_N[:, None]
    label_logit_b, kept_bK = logits_bV.gather(1, label_b1).squeeze(1), logits_bV.gather(1, targets.kept_ids_NK)
    top_b = logits_bV.argmax(dim=1) if detailed else None
    off_b = _mask_kept_(logits_bV, kept_bK, targets)
    # Whatever all logits of a position have in common is taken off: at 1e3 it would cost their differences four digits.
    shift_b = torch.cat([off_b[:, None], kept_bK.masked_fill(~targets.is_kept_NK, -torch.inf)], dim=1).amax(dim=1)
    largest_b, temperature = off_b - shift_b, objective.temperature
    if tempered_bV is not None:
        tempered_bV = torch.div(logits_bV, temperature, out=tempered_bV[: len(logits_bV)])
    inputs = [kept_bK - shift_b[:, None], label_logit_b - shift_b, largest_b + _softmax_(logits_bV)]
    off_entropy_b, has_entropy_b = _entropy(logits_bV, stride=1 if detailed else ENTROPY_STRIDE)
    if tempered_bV is not None:
        inputs.append(largest_b / temperature + _softmax_(tempered_bV))
    # Hooks of a checkpoint around the loss are not for what is differentiated here and now.
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        leaves = [tensor.detach().requires_grad_(is_differentiated) for tensor in inputs]
        student = StudentView(
            kept_logits_nK=leaves[0],
            label_logit_n=leaves[1],
            lse_off_n=leaves[2],
            tempered_lse_off_n=leaves[-1],
            shift_n=shift_b,
        )
        total_b, ce_b, kd_b = per_position(objective, student, targets)
        total = (targets.weight_N * total_b).sum() / denominator
    values_Mb = measure(
        student.detached(),
        targets,
        ce_n=ce_b.detach(),
        kd_n=kd_b.detach(),
        off_entropy_n=off_entropy_b,
        has_entropy_n=has_entropy_b,
        top_n=top_b,
    )
    if is_differentiated:
        d_kept_bK, d_label_b, d_off_b, *d_tempered_b = torch.autograd.grad(
            total, leaves, allow_unused=True, materialize_grads=True
        )
        logits_bV.mul_(d_off_b[:, None])
        if tempered_bV is not None:
            logits_bV.addcmul_(tempered_bV, (d_tempered_b[0] / temperature)[:, None])
        # Padding of the kept ids adds zeros.
        logits_bV.scatter_add_(1, targets.kept_ids_NK, d_kept_bK).scatter_add_(1, label_b1, d_label_b[:, None])
        logits_bV.mul_(slope)
    return total.detach(), values_Mb


def _mask_kept_(logits_bV: Tensor, kept_bK: Tensor, targets: Targets) -> Tensor:
    """−inf at the kept ids.  Returns the largest logit off them [b]; −inf where nothing is left.

    There one kept logit comes back, as a softmax needs one: what is said of it then has a weight of 0.
    """
    if not targets.num_kept:
        return logits_bV.amax(dim=1)
    # Padding does as the first kept id does; where nothing is kept, it writes what was there.
    ids_bK = torch.where(targets.is_kept_NK, targets.kept_ids_NK, targets.kept_ids_NK[:, :1])
    first_b1, has_kept_b1 = kept_bK[:, :1], targets.is_kept_NK[:, :1]
    logits_bV.scatter_(1, ids_bK, torch.where(has_kept_b1, -torch.inf, first_b1).expand_as(ids_bK))
    off_b = logits_bV.amax(dim=1)
    stays_b1 = torch.isneginf(off_b)[:, None] | ~has_kept_b1
    logits_bV.scatter_(1, ids_bK[:, :1], torch.where(stays_b1, first_b1, -torch.inf))
    return off_b


def _softmax_(z_bV: Tensor) -> Tensor:
    """In place of z; returns logsumexp(z) − max(z) [b], exact for a tail of any size: max softmax is 1/V at least."""
    torch.softmax(z_bV, dim=1, out=z_bV)
    return -z_bV.amax(dim=1).log()


def _entropy(softmax_bV: Tensor, *, stride: int) -> tuple[Tensor, Tensor]:
    """Of one row in so many, 0 elsewhere [b]; and 1 where it was taken [b].

    Not of every so-many-th: where all replies have two tokens that would be the first of each, never the second.
    """
    entropy_b, has_entropy_b = (softmax_bV.new_zeros(len(softmax_bV)) for _ in range(2))
    taken = slice(None) if stride == 1 else _one_in(stride, softmax_bV)
    entropy_b[taken] = torch.special.entr(softmax_bV[taken]).sum(dim=1)
    has_entropy_b[taken] = 1.0
    return entropy_b, has_entropy_b


def _one_in(stride: int, rows_bV: Tensor) -> Tensor:
    """Numbers of rows, one of each `stride`, at places without a pattern: Knuth's multiplicative hash."""
    number_t = torch.arange(-(-len(rows_bV) // stride), device=rows_bV.device)
    place_t = (number_t * 2654435761 >> 15) % stride
    return (stride * number_t + place_t).clamp_max(len(rows_bV) - 1)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _head_slope(head: OutputHead, logits_bV: Tensor) -> Tensor | float:
    """d logits / d product: scale, and 1 − (z / softcap)² under a softcap."""
    if head.softcap is None:
        return head.scale
    return logits_bV.div(head.softcap).square_().neg_().add_(1.0).mul_(head.scale)


def _accumulate(d_weight_VD: Tensor, d_product_nV: Tensor, hidden_nD: Tensor) -> None:
    """d_weight += d_productᵀ @ hidden in fp32."""
    if d_product_nV.dtype == d_weight_VD.dtype:
        d_weight_VD.addmm_(d_product_nV.T, hidden_nD)
        return
    for begin in range(0, len(d_weight_VD), WEIGHT_ROWS):
        rows = slice(begin, begin + WEIGHT_ROWS)
        d_weight_VD[rows] += torch.mm(d_product_nV[:, rows].T, hidden_nD)


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    device_type = hidden_ND.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_ND.dtype


def rows_of_chunk(num_positions: int, vocab_size: int, dtype: torch.dtype, *, asked: int | None) -> int:
    """Positions whose logits live at once."""
    fitting = _power_of_two_within(CHUNK_BYTES // (vocab_size * dtype.itemsize))
    wanted = asked or min(max(fitting, CHUNK_ROWS[0]), CHUNK_ROWS[1])
    return min(wanted, _padded_rows(num_positions))


def rows_of_block(chunk_rows: int, vocab_size: int, device: torch.device) -> int:
    """Of a chunk, those that are fp32 at once."""
    return min(chunk_rows, max(SMALLEST_ROWS, _power_of_two_within(block_bytes(device) // (4 * vocab_size))))


def _power_of_two_within(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)


def _padded_rows(number: int) -> int:
    return max(SMALLEST_ROWS, 1 << max(number - 1, 0).bit_length())
