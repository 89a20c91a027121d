"""A chunk of teacher logits to what a position stores.  One function for every engine.

Everything is computed in fp32 over the full vocabulary.  The tail is a logsumexp over the ids that are not
kept (mask, then reduce), never 1 − Σ of the kept: that is ≤ 0 in a tenth of real positions.

Shapes: N positions of the chunk, V = the teacher's config.vocab_size, C candidate ids (k and the always-kept),
A always-kept ids, T declared temperatures, E kept entries of all positions.
Memory: N × V floats, and a block of rows twice more (`Threshold`: also as marks).
Time: two passes over memory and six over what the cache holds, two more for each temperature but 1.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.device import block_bytes
from shared.errors import ConfigError
from shared.rows import Positions
from teacher_dump.config import KeepSettings

FLOOR = torch.finfo(torch.bfloat16).min  # a logit of −inf, or of any format's least, without −inf · 0 = NaN
BLOCK = 512
GROUP = 32
SMALLEST_SUM = 1e-24
"""Of exponentials: above it, what has underflowed (at most V · 1e-38) is no part of it."""
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


def keep_rule(settings: KeepSettings, tokenizer: Any) -> TopK | Threshold:
    """The rule with its always-kept tokens as ids; raises ConfigError for one that the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in settings.always if token not in vocabulary]
    if unknown:
        raise ConfigError(
            f"keep.always: the tokenizer has no token {unknown[0]!r}",
            next_step="give tokens exactly as the tokenizer spells them",
        )
    ids = tuple(sorted({vocabulary[token] for token in settings.always}))
    if settings.method == "threshold":
        return Threshold(tau=settings.tau, seed=settings.seed, always_ids=ids)
    return TopK(k=settings.k, min_prob=settings.min_prob, always_ids=ids)


@dataclass(frozen=True, kw_only=True)
class KeptChunk:
    """What N positions store, kept entries one after the other, ids ascending within a position."""

    counts_N: Tensor
    ids_E: Tensor
    logp_E: Tensor
    realised_logp_N: Tensor
    entropy_N: Tensor
    tail_logsum_NT: Tensor

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

    `temperatures` begin with 1.  `draws_N` are the positions' uniform numbers, for `Threshold` alone.
    A NaN or +inf anywhere in a row makes its normaliser NaN, and with it its entropy and every log p.
    """
    num_rows = max(1, block_bytes(logits_NV.device) // (16 * logits_NV.shape[1]))
    scratch = torch.empty_like(logits_NV[:num_rows]), torch.empty_like(logits_NV[:num_rows])
    blocks: list[KeptChunk] = []
    for begin in range(0, len(logits_NV), num_rows):
        rows = slice(begin, begin + num_rows)
        block_NV = logits_NV[rows]
        exp_NV, product_NV = (each_NV[: len(block_NV)] for each_NV in scratch)
        draws = None if draws_N is None else draws_N[rows]
        blocks.append(_keep_block(block_NV, realised_N[rows], rule, temperatures, draws, exp_NV, product_NV))
    return KeptChunk(**{f.name: torch.cat([getattr(block, f.name) for block in blocks]) for f in fields(KeptChunk)})


def _keep_block(
    logits_NV: Tensor,
    realised_N: Tensor,
    rule: TopK | Threshold,
    temperatures: Sequence[float],
    draws_N: NDArray[np.float64] | None,
    exp_NV: Tensor,
    product_NV: Tensor,
) -> KeptChunk:
    """See `keep_chunk`; the last two are there to be written to."""
    largest_NG = _group_largest(logits_NV)
    # log p = z − log Z, with z the logits shifted so that their largest is 0.
    z_NV = logits_NV.sub_(largest_NG.amax(dim=1, keepdim=True))
    z_NV.clamp_(min=FLOOR)
    torch.exp(z_NV, out=exp_NV)
    sum_N = exp_NV.sum(dim=1)
    log_Z_N = sum_N.log()
    # H = −Σ p log p = log Z − Σ e^z z / Z
    entropy_N = (log_Z_N - torch.mul(exp_NV, z_NV, out=product_NV).sum(dim=1) / sum_N).clamp_(min=0.0)
    realised_z_N = z_NV.gather(1, realised_N[:, None]).squeeze(1)
    realised_logp_N = realised_z_N.masked_fill(realised_z_N <= FLOOR, -torch.inf) - log_Z_N
    if isinstance(rule, TopK):
        counts_N, ids_E, logp_E = _keep_largest(z_NV, log_Z_N, rule, largest_NG)
        row_E = torch.arange(len(z_NV), device=z_NV.device).repeat_interleave(counts_N)
        z_NV[row_E, ids_E] = -torch.inf
        exp_NV[row_E, ids_E] = 0.0
        tails = [_tail_logsum(z_NV, log_Z_N, temperature, exp_NV) for temperature in temperatures]
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


def _group_largest(logits_NV: Tensor) -> Tensor:
    """The largest of every GROUP logits [N, G]; the last group may be smaller."""
    num_whole = logits_NV.shape[1] // GROUP
    largest = [logits_NV[:, : num_whole * GROUP].unflatten(1, (num_whole, GROUP)).amax(dim=2)] if num_whole else []
    if logits_NV.shape[1] % GROUP:
        largest.append(logits_NV[:, num_whole * GROUP :].amax(dim=1, keepdim=True))
    return torch.cat(largest, dim=1) if len(largest) > 1 else largest[0]


def _largest(z_NV: Tensor, k: int, largest_NG: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest and their ids [N, k].

    They lie in the k groups with the largest maxima: an id of another group has k at least as large before it.  So
    topk, which is slow over a vocabulary, goes over the groups and then over what they hold.
    """
    vocab_size = z_NV.shape[1]
    num_whole = vocab_size // GROUP
    if 2 * k > num_whole:
        return z_NV.topk(min(k, vocab_size), dim=1)
    group_Nk = largest_NG[:, :num_whole].topk(k, dim=1).indices
    whole_NgG = z_NV[:, : num_whole * GROUP].unflatten(1, (num_whole, GROUP))
    among_NM = whole_NgG.gather(1, group_Nk[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    rest = range(num_whole * GROUP, vocab_size)
    if rest:
        among_NM = torch.cat([among_NM, z_NV[:, rest.start :]], dim=1)
    z_Nk, place_Nk = among_NM.topk(k, dim=1)
    of_group_Nk = group_Nk.gather(1, (place_Nk // GROUP).clamp(max=k - 1)) * GROUP + place_Nk % GROUP
    return z_Nk, torch.where(place_Nk < k * GROUP, of_group_Nk, place_Nk - k * GROUP + rest.start)


def _keep_largest(z_NV: Tensor, log_Z_N: Tensor, rule: TopK, largest_NG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, ids and log p of what is kept; an id of probability zero never is."""
    z_NC, ids_NC = _largest(z_NV, rule.k, largest_NG)
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


def _tail_logsum(z_NV: Tensor, log_Z_N: Tensor, temperature: float, exp_NV: Tensor) -> Tensor:
    """log Σ p^(1/T) over the ids whose z is not −inf; `exp_NV` holds their e^z, and loses it at T other than 1."""
    if temperature != 1.0:
        torch.mul(z_NV, 1.0 / temperature, out=exp_NV).exp_()
    sum_N = exp_NV.sum(dim=1)
    tail_N = sum_N.log() - log_Z_N / temperature
    is_small_N = ~(sum_N > SMALLEST_SUM)
    if bool(is_small_N.any()):
        tail_N[is_small_N] = _small_tail_logsum(z_NV[is_small_N], log_Z_N[is_small_N], temperature)
    return tail_N


def _small_tail_logsum(z_NV: Tensor, log_Z_N: Tensor, temperature: float) -> Tensor:
    """The same, shifted by their own largest, so that no tail underflows."""
    largest_N = z_NV.amax(dim=1)
    shift_N = largest_N.masked_fill(torch.isneginf(largest_N), 0.0)
    sum_N = z_NV.sub_(shift_N[:, None]).div_(temperature).exp_().sum(dim=1)
    tail_N = sum_N.log() + (shift_N - log_Z_N) / temperature
    return tail_N.masked_fill(largest_N <= FLOOR, -torch.inf)  # what is left has no probability at all
