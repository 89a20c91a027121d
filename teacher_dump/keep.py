"""A chunk of teacher logits to what a position stores.  One function for every engine.

Everything is computed in fp32 over the full vocabulary.  The tail is a logsumexp over the ids that are not
kept (mask, then reduce), never 1 − Σ of the kept: that is ≤ 0 in a tenth of real positions.

Shapes: N positions of the chunk, V = the teacher's config.vocab_size, C candidate ids (k and the always-kept),
A always-kept ids, T declared temperatures.
Memory: twice N × V floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.rows import Positions

NOT_KEPT = torch.iinfo(torch.int32).max
FLOOR = torch.finfo(torch.float32).min  # a logit of −inf, as models give to padding, without −inf · 0 = NaN


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """The k largest with p >= min_prob (the largest in any case), and some ids at every position."""

    k: int
    min_prob: float
    always_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class KeptChunk:
    """What N positions store, still rectangular; an id of NOT_KEPT marks an entry that is not kept."""

    ids_NC: Tensor
    logp_NC: Tensor
    realised_logp_N: Tensor
    entropy_N: Tensor
    tail_logsum_NT: Tensor

    def first_unscorable(self) -> int | None:
        """Index of the first position that cannot be stored: no numbers, or a realised token ruled out for certain.

        A NaN or +inf anywhere in a row makes the row's normaliser NaN, and with it every log p of the row.
        """
        bad_N = ~(torch.isfinite(self.realised_logp_N) & torch.isfinite(self.entropy_N))
        return int(bad_N.nonzero()[0]) if bool(bad_N.any()) else None

    def positions(self) -> Positions:
        """As numpy arrays with the kept entries one after the other."""
        ids_NC, logp_NC = self.ids_NC.cpu().numpy(), self.logp_NC.cpu().numpy()
        kept_NC = ids_NC != NOT_KEPT
        return Positions(
            kept_counts_P=kept_NC.sum(axis=1, dtype=np.int32),
            kept_ids_E=ids_NC[kept_NC],
            kept_logp_E=logp_NC[kept_NC],
            realised_logp_P=self.realised_logp_N.cpu().numpy(),
            entropy_P=self.entropy_N.cpu().numpy(),
            tail_logsum_PT=self.tail_logsum_NT.cpu().numpy(),
        )


def keep_chunk(logits_NV: Tensor, realised_N: Tensor, rule: KeepRule, temperatures: Sequence[float]) -> KeptChunk:
    """Stored values of N positions from their fp32 logits, which are overwritten.

    `KeptChunk.first_unscorable` tells whether the logits were numbers.
    """
    # log p = z − log Z, with z the logits shifted so that their largest is 0.
    z_NV = logits_NV.sub_(logits_NV.amax(dim=1, keepdim=True))
    z_NV.clamp_(min=FLOOR)
    exp_NV = z_NV.exp()
    sum_N = exp_NV.sum(dim=1)
    log_Z_N = sum_N.log()
    # H = −Σ p log p = log Z − Σ e^z z / Z
    entropy_N = (log_Z_N - torch.bmm(exp_NV[:, None, :], z_NV[:, :, None]).flatten() / sum_N).clamp_(min=0.0)
    realised_z_N = z_NV.gather(1, realised_N[:, None]).squeeze(1)
    realised_logp_N = realised_z_N.masked_fill(realised_z_N <= FLOOR, -torch.inf) - log_Z_N
    ids_NC, kept_logp_NC, is_kept_NC = _candidates(z_NV, log_Z_N, rule)
    # Through the kept entries alone: an id may be a candidate twice, but is kept once.
    row_NC = torch.arange(len(ids_NC), device=ids_NC.device)[:, None].expand_as(ids_NC)
    z_NV[row_NC[is_kept_NC], ids_NC[is_kept_NC]] = -torch.inf
    tails = [_tail_logsum(z_NV, log_Z_N, temperature, scratch_NV=exp_NV) for temperature in temperatures]
    ids_NC, order_NC = ids_NC.masked_fill(~is_kept_NC, NOT_KEPT).sort(dim=1)
    return KeptChunk(
        ids_NC=ids_NC.to(torch.int32),
        logp_NC=kept_logp_NC.gather(1, order_NC),
        realised_logp_N=realised_logp_N,
        entropy_N=entropy_N,
        tail_logsum_NT=torch.stack(tails, dim=1),
    )


def _candidates(z_NV: Tensor, log_Z_N: Tensor, rule: KeepRule) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N, C], their log p and which of them are kept; an id of probability zero never is."""
    z_NC, ids_NC = z_NV.topk(min(rule.k, z_NV.shape[1]), dim=1)
    is_kept_NC = (z_NC - log_Z_N[:, None]).exp() >= rule.min_prob
    is_kept_NC[:, 0] = True
    if rule.always_ids:
        always_NA = torch.tensor(rule.always_ids, device=ids_NC.device).expand(len(ids_NC), -1)
        among_top_NA = ((always_NA[:, :, None] == ids_NC[:, None, :]) & is_kept_NC[:, None, :]).any(dim=2)
        ids_NC = torch.cat([ids_NC, always_NA], dim=1)
        z_NC = torch.cat([z_NC, z_NV.gather(1, always_NA)], dim=1)
        is_kept_NC = torch.cat([is_kept_NC, ~among_top_NA], dim=1)
    return ids_NC, z_NC - log_Z_N[:, None], is_kept_NC & (z_NC > FLOOR)


def _tail_logsum(z_NV: Tensor, log_Z_N: Tensor, temperature: float, *, scratch_NV: Tensor) -> Tensor:
    """log Σ p^(1/T) over the ids whose z is not −inf; shifted by their own largest, so that no tail underflows."""
    largest_N = z_NV.amax(dim=1)
    shift_N = largest_N.masked_fill(torch.isneginf(largest_N), 0.0)
    torch.sub(z_NV, shift_N[:, None], out=scratch_NV)
    sum_N = scratch_NV.div_(temperature).exp_().sum(dim=1)
    tail_N = sum_N.log() + (shift_N - log_Z_N) / temperature
    return tail_N.masked_fill(largest_N <= FLOOR, -torch.inf)  # what is left has no probability at all
