"""A chunk of teacher logits to what a position stores.  One function for every engine.

Everything is computed in fp32 over the full vocabulary.  The tail is a logsumexp over the ids that are not
kept (mask, then reduce), never 1 − Σ of the kept: that is ≤ 0 in a tenth of real positions.

Shapes: N positions of the chunk, V = the teacher's config.vocab_size, C candidate ids (k and the always-kept),
A always-kept ids, T declared temperatures, E kept entries of all positions.
Memory: twice N × V floats; `Threshold` also N × V marks.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.rows import Positions

FLOOR = torch.finfo(torch.float32).min  # a logit of −inf, as models give to padding, without −inf · 0 = NaN
BLOCK = 512
BELOW_ONE = 1 - 2.0**-24


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest with p >= min_prob (the largest in any case), and some ids at every position."""

    k: int
    min_prob: float
    always_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Every p >= tau and some ids at every position as they are; every other id with probability p/tau and weight tau.

    E[w] = p for every id, so what is linear in w is unbiased: Σ w log q, and the forward KL's gradient (Σ w)·q − w.
    Var[w] = p·(tau − p), summed over the ids the least that so many ids on average allow (threshold sampling: Duffield,
    Lund, Thorup, "Learn more, sample less", IEEE Trans. Inf. Theory 51, 2005).  One uniform number draws for a whole
    position (systematic sampling: Madow, Ann. Math. Stat. 20, 1949), so that the number of ids and Σ w hardly vary.
    """

    tau: float
    seed: int
    always_ids: tuple[int, ...]

    @property
    def sampled_logp(self) -> float:
        """The log weight of every id that was sampled."""
        return float(np.float32(math.log(self.tau)))

    def draws(self, sample_id: str, num_positions: int) -> NDArray[np.float64]:
        """A uniform number in [0, 1) for each position, from SHAKE-256: the same wherever and whenever it is drawn."""
        digest = hashlib.shake_256(f"{self.seed}:{sample_id}".encode()).digest(8 * num_positions)
        return (np.frombuffer(digest, dtype="<u8") >> 11).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class KeptChunk:
    """What N positions store, kept entries one after the other, ids ascending within a position."""

    counts_N: Tensor
    ids_E: Tensor
    logp_E: Tensor
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
        """As numpy arrays."""
        return Positions(
            kept_counts_P=self.counts_N.to(torch.int32).cpu().numpy(),
            kept_ids_E=self.ids_E.to(torch.int32).cpu().numpy(),
            kept_logp_E=self.logp_E.cpu().numpy(),
            realised_logp_P=self.realised_logp_N.cpu().numpy(),
            entropy_P=self.entropy_N.cpu().numpy(),
            tail_logsum_PT=self.tail_logsum_NT.cpu().numpy(),
        )


def keep_chunk(
    logits_NV: Tensor,
    realised_N: Tensor,
    rule: TopK | Threshold,
    temperatures: Sequence[float],
    draws_N: NDArray[np.float64] | None = None,
) -> KeptChunk:
    """Stored values of N positions from their fp32 logits, which are overwritten.

    `draws_N` are the positions' uniform numbers, for `Threshold` alone.  `KeptChunk.first_unscorable` tells whether
    the logits were numbers.
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
    if isinstance(rule, TopK):
        counts_N, ids_E, logp_E = _keep_largest(z_NV, log_Z_N, rule)
        row_E = torch.arange(len(z_NV), device=z_NV.device).repeat_interleave(counts_N)
        z_NV[row_E, ids_E] = -torch.inf
        tails = [_tail_logsum(z_NV, log_Z_N, temperature, scratch_NV=exp_NV) for temperature in temperatures]
    else:
        assert draws_N is not None, "sampling needs a draw for each position"
        counts_N, ids_E, logp_E = _keep_sampled(z_NV, log_Z_N, exp_NV.div_(sum_N[:, None]), rule, draws_N)
        tails = []
    return KeptChunk(
        counts_N=counts_N,
        ids_E=ids_E,
        logp_E=logp_E,
        realised_logp_N=realised_logp_N,
        entropy_N=entropy_N,
        tail_logsum_NT=torch.stack(tails, dim=1) if tails else entropy_N.new_zeros(len(entropy_N), 0),
    )


def _keep_largest(z_NV: Tensor, log_Z_N: Tensor, rule: TopK) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, ids and log p of what is kept; an id of probability zero never is."""
    z_NC, ids_NC = z_NV.topk(min(rule.k, z_NV.shape[1]), dim=1)
    is_kept_NC = (z_NC - log_Z_N[:, None]).exp() >= rule.min_prob
    is_kept_NC[:, 0] = True
    if rule.always_ids:
        always_NA = torch.tensor(rule.always_ids, device=ids_NC.device).expand(len(ids_NC), -1)
        # An id may be a candidate twice, but is kept once.
        among_top_NA = ((always_NA[:, :, None] == ids_NC[:, None, :]) & is_kept_NC[:, None, :]).any(dim=2)
        ids_NC = torch.cat([ids_NC, always_NA], dim=1)
        z_NC = torch.cat([z_NC, z_NV.gather(1, always_NA)], dim=1)
        is_kept_NC = torch.cat([is_kept_NC, ~among_top_NA], dim=1)
    is_kept_NC &= z_NC > FLOOR
    ids_NC, order_NC = ids_NC.masked_fill(~is_kept_NC, z_NV.shape[1]).sort(dim=1)
    is_kept_NC = ids_NC < z_NV.shape[1]
    logp_NC = (z_NC - log_Z_N[:, None]).gather(1, order_NC)
    return is_kept_NC.sum(dim=1), ids_NC[is_kept_NC], logp_NC[is_kept_NC]


def _keep_sampled(
    z_NV: Tensor, log_Z_N: Tensor, p_NV: Tensor, rule: Threshold, draws_N: NDArray[np.float64]
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, ids and log weights; p is overwritten."""
    is_exact_NV = p_NV >= rule.tau
    if rule.always_ids:
        is_exact_NV[:, list(rule.always_ids)] = True
    inclusion_NV = p_NV.div_(rule.tau).masked_fill_(is_exact_NV, 0.0)
    is_kept_NV = _systematic_sample(inclusion_NV, draws_N).logical_or_(is_exact_NV)
    is_kept_NV &= z_NV > FLOOR
    row_E, ids_E = is_kept_NV.nonzero(as_tuple=True)
    logp_E = z_NV[row_E, ids_E] - log_Z_N[row_E]
    logp_E = logp_E.masked_fill(~is_exact_NV[row_E, ids_E], rule.sampled_logp)
    return is_kept_NV.sum(dim=1), ids_E, logp_E


def _systematic_sample(inclusion_NV: Tensor, draws_N: NDArray[np.float64]) -> Tensor:
    """Marks [N, V]: an id is drawn where the running sum of the inclusion probabilities and the draw passes an integer.

    The sums run within blocks in fp32 and from block to block in fp64 (on the host, where every platform has it): in
    one fp32 sum over the vocabulary the improbable ids would vanish.  Works in place.
    """
    vocab_size = inclusion_NV.shape[1]
    num_whole = vocab_size // BLOCK
    whole_NbB = inclusion_NV[:, : num_whole * BLOCK].unflatten(1, (num_whole, BLOCK))
    rest_NB = inclusion_NV[:, num_whole * BLOCK :]
    sums_Nb: list[Tensor] = []
    if num_whole:
        whole_NbB.cumsum_(dim=2)
        sums_Nb.append(whole_NbB[:, :, -1])
    if rest_NB.shape[1]:
        rest_NB.cumsum_(dim=1)
        sums_Nb.append(rest_NB[:, -1:])
    total_Nb = np.cumsum(torch.cat(sums_Nb, dim=1).cpu().numpy().astype(np.float64), axis=1)
    start_Nb = np.concatenate([np.zeros((len(draws_N), 1)), total_Nb[:, :-1]], axis=1) + draws_N[:, None]
    fraction_Nb = np.minimum(start_Nb - np.floor(start_Nb), BELOW_ONE).astype(np.float32)
    offset_Nb = torch.from_numpy(fraction_Nb).to(inclusion_NV.device)
    whole_NbB.add_(offset_Nb[:, :num_whole, None])
    if rest_NB.shape[1]:
        rest_NB.add_(offset_Nb[:, num_whole:])
    passed_NV = inclusion_NV.floor_()
    is_drawn_NV = torch.empty_like(passed_NV, dtype=torch.bool)
    torch.gt(passed_NV[:, 1:], passed_NV[:, :-1], out=is_drawn_NV[:, 1:])
    is_drawn_NV[:, ::BLOCK] = passed_NV[:, ::BLOCK] > 0
    return is_drawn_NV


def _tail_logsum(z_NV: Tensor, log_Z_N: Tensor, temperature: float, *, scratch_NV: Tensor) -> Tensor:
    """log Σ p^(1/T) over the ids whose z is not −inf; shifted by their own largest, so that no tail underflows."""
    largest_N = z_NV.amax(dim=1)
    shift_N = largest_N.masked_fill(torch.isneginf(largest_N), 0.0)
    torch.sub(z_NV, shift_N[:, None], out=scratch_NV)
    sum_N = scratch_NV.div_(temperature).exp_().sum(dim=1)
    tail_N = sum_N.log() + (shift_N - log_Z_N) / temperature
    return tail_N.masked_fill(largest_N <= FLOOR, -torch.inf)  # what is left has no probability at all
