"""Log-probabilities rounded to so few values that Parquet and zstd make them small, at a loss that is measured.

Levels lie close where probability is and apart where there is next to none.  For an error e_i of log p_i the loss is
KL ≈ ½ Var_p(e), so at equal bytes the best spacing at T = 1 goes with p^(-1/2); T > 1 sees more of the improbable ids,
so a second term keeps p^(-1/5), and a third bounds what is left.  With x = log p and the `step` h, level k is where

    L(x) = (2/h)·e^(x/2) + (5/8h)·e^(x/5) + x/8     and     L(0) − L(x) = k

Up to 256 values get by with one byte each before zstd, which the constants are chosen for: 1e-4 nats takes 170 to 250.
What lies below the last level is stored as it is.  A reader needs none of this: what is stored are log-probabilities.

Shapes: P positions, E kept entries of all of them, T declared temperatures.
Time: 1 to 2 µs for a position of 64 entries and each temperature, most of it spent measuring.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.rows import Float32, Positions

Float64 = NDArray[np.float64]

LOWEST = -110.0
"""Of the grid, in nats; e^-104 is the least that fp32 holds."""
STEP_AT_1E_4 = 0.0155
"""What most teachers need for a KL of 1e-4 nats."""
COARSEST_STEP = 1.0
SAFETY, COARSER = 0.97, 0.8
WORST = 10
"""Times the mean that a single position may lose: where most are certain, the mean alone would let others go."""
SAMPLE_POSITIONS = 2048
CHUNK_ENTRIES = 1 << 15
"""Entries worked on at once, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class Grid:
    """The levels of one `step`."""

    step: float

    @cached_property
    def levels(self) -> Float32:
        """From 0 down to LOWEST, in nats."""
        x = -np.geomspace(1e-9, -LOWEST, 1 << 15)
        depth = self._depth(0.0) - self._depth(x)
        wanted = np.arange(1, int(depth[-1]) + 1)
        guess = np.interp(wanted, depth, x)
        for _ in range(4):  # Newton: the table is as exact as its numbers
            slope = np.exp(guess / 2) / self.step + np.exp(guess / 5) / (8 * self.step) + 0.125
            guess -= (self._depth(guess) - self._depth(0.0) + wanted) / slope
        return np.concatenate([[0.0], guess]).astype(np.float32)

    def rounded(self, logp: Float32) -> Float32:
        """The nearest level of each, as L sees it; what lies below the last stays.  Keeps the order of values."""
        with np.errstate(invalid="ignore"):  # −inf is an empty tail
            depth = self._depth(0.0) - self._depth(logp)
            is_below = ~(depth < len(self.levels) - 0.5)
            result = np.take(self.levels, np.rint(depth).astype(np.intp), mode="clip")
        if is_below.any():
            result[is_below] = logp[is_below]
        return result

    def _depth(self, x: Any) -> Any:
        fifth = np.exp(x * np.float32(0.2))
        return np.exp(x * np.float32(0.5)) * np.float32(2 / self.step) + (
            fifth * np.float32(0.625 / self.step) + x * np.float32(0.125)
        )


def round_positions(
    exact: Positions, temperatures: Sequence[float], *, max_kl: float, untouched_logp: float | None = None
) -> tuple[Positions, Float64]:
    """Rounded as coarsely as a mean loss of `max_kl` nats at T = 1 allows, and what that lost [P, T]; 0 rounds nothing.

    No position loses more than WORST times that, nor do its probabilities add up to more than `mass_tolerance` apart.
    `untouched_logp` is a value that stays as it is: rounding the one weight that all sampled ids share would bias them.
    """
    is_number = np.isfinite(exact.kept_logp_E).all() and not np.isnan(exact.tail_logsum_PT).any()
    if not max_kl or not exact.num_positions or not is_number:  # what is no number is the writer's to refuse
        return exact, np.zeros((exact.num_positions, len(temperatures)))
    sample = _sample(exact)
    step = STEP_AT_1E_4 * (max_kl / 1e-4) ** 0.5
    even_step = 2.0 ** min(math.floor(math.log2(1.6 * max_kl**0.5)), -3)
    for _ in range(3):
        loss_PT, _ = _losses(sample, _on_grid(sample, Grid(step), even_step, untouched_logp), [1.0])
        step = _next_step(step, float(loss_PT.mean()), max_kl)
    while True:
        rounded = _on_grid(exact, Grid(step), even_step, untouched_logp)
        loss_PT, change_P = _losses(exact, rounded, temperatures)
        mean, worst = float(loss_PT[:, 0].mean()), float(loss_PT[:, 0].max())
        if mean <= max_kl and worst <= WORST * max_kl and np.abs(change_P).max() <= 0.9 * mass_tolerance(max_kl):
            return rounded, loss_PT
        step = min(_next_step(step, mean, max_kl), step * (SAFETY if mean > max_kl else COARSER))


def mass_tolerance(max_kl: float) -> float:
    """By how much rounding may move what the stored probabilities of a position add up to."""
    return 1e-3 + 20 * max_kl**0.5


def storage_loss(exact: Positions, stored: Positions, temperatures: Sequence[float]) -> Float64:
    """What storage lost at every position and declared temperature, in nats [P, T].

    With tails KL(exact ‖ stored) over kept ids and tail, both normalised.  Without (weights w of sampled ids) the
    divergence that needs no normalisation, Σ w log(w/ŵ) − w + ŵ.  Both by their second-order remainder
    e + expm1(−e) with e = log p − log p̂: in fp32, to 1e-7 of the errors themselves.
    """
    return _losses(exact, stored, temperatures)[0]


def _losses(exact: Positions, stored: Positions, temperatures: Sequence[float]) -> tuple[Float64, Float64]:
    """`storage_loss` [P, T], and by how much the sum of a position's probabilities (or weights) changed [P]."""
    loss_PT = np.empty((exact.num_positions, len(temperatures)))
    change_P = np.empty(exact.num_positions)
    for chunk, entries in _chunks(exact):
        counts_P, x_E = exact.kept_counts_P[chunk], exact.kept_logp_E[entries]
        error_E = x_E - stored.kept_logp_E[entries]
        starts_P = np.cumsum(counts_P) - counts_P
        for j, temperature in enumerate(temperatures):
            scale = np.float32(1 / temperature)
            scaled_E, e_E = x_E * scale, error_E * scale
            has_tails = exact.tail_logsum_PT.shape[1] > 0
            tail_P = exact.tail_logsum_PT[chunk, j].astype(np.float64) if has_tails else np.full(len(counts_P), -np.inf)
            if temperature < 1:  # p^(1/T) of even the most probable may be less than fp32 holds
                top_P = np.maximum(np.maximum.reduceat(scaled_E, starts_P), tail_P)
                scaled_E = scaled_E - np.repeat(top_P.astype(np.float32), counts_P)
                tail_P = tail_P - top_P
            p_E, moved_E = np.exp(scaled_E), np.expm1(-e_E)
            loss_P, sum_P = _sums(p_E * (e_E + moved_E), starts_P), _sums(p_E * moved_E, starts_P)
            if has_tails:
                with np.errstate(invalid="ignore"):
                    e_P = exact.tail_logsum_PT[chunk, j].astype(np.float64) - stored.tail_logsum_PT[chunk, j]
                e_P[np.isneginf(tail_P)] = 0.0
                p_P, moved_P = np.exp(tail_P), np.expm1(-e_P)
                total_P = _sums(p_E, starts_P) + p_P
                sum_P += p_P * moved_P
                shift_P = sum_P / total_P
                loss_P = (loss_P + p_P * (e_P + moved_P)) / total_P + np.log1p(shift_P) - shift_P
            loss_PT[chunk, j] = np.maximum(loss_P, 0.0)
            if j == 0:
                change_P[chunk] = sum_P
    return loss_PT, change_P


def _sums(values_E: Float32, starts_P: NDArray[np.int64]) -> Float64:
    return np.add.reduceat(values_E, starts_P).astype(np.float64)


def _on_grid(exact: Positions, grid: Grid, even_step: float, untouched_logp: float | None) -> Positions:
    """Kept, realised and the tail at T = 1 on one grid, so that equal values stay equal.

    Entropy and the other tails, which are not the logarithm of one probability, in even steps: 1/64 and 1/256 nat for
    a loss of 1e-4, where they add a tenth of it.
    """

    def rounded(values: Float32) -> Float32:
        result = np.empty_like(values)
        for begin in range(0, len(values), CHUNK_ENTRIES):
            part = slice(begin, begin + CHUNK_ENTRIES)
            result[part] = grid.rounded(values[part])
        if untouched_logp is not None:
            same = values == np.float32(untouched_logp)
            result[same] = values[same]
        return result

    tail_PT = (np.rint(exact.tail_logsum_PT / even_step) * even_step).astype(np.float32)
    tail_PT[:, :1] = rounded(exact.tail_logsum_PT[:, :1].ravel()).reshape(tail_PT[:, :1].shape)
    return replace(
        exact,
        kept_logp_E=rounded(exact.kept_logp_E),
        realised_logp_P=rounded(exact.realised_logp_P),
        entropy_P=(np.rint(exact.entropy_P * (4 / even_step)) * (even_step / 4)).astype(np.float32),
        tail_logsum_PT=tail_PT,
    )


def _next_step(step: float, loss: float, max_kl: float) -> float:
    """The loss goes with the square of the step."""
    if loss <= 0.0:
        return min(step * 4, COARSEST_STEP)
    return min(step * min(max((SAFETY * max_kl / loss) ** 0.5, 0.25), 4.0), COARSEST_STEP)


def _sample(positions: Positions) -> Positions:
    """Some of the positions, evenly spread."""
    stride = -(-positions.num_positions // SAMPLE_POSITIONS)
    chosen = np.arange(0, positions.num_positions, stride)
    ends_P = np.cumsum(positions.kept_counts_P, dtype=np.int64)
    counts_P = positions.kept_counts_P[chosen]
    within_E = np.arange(counts_P.sum()) - np.repeat(np.cumsum(counts_P) - counts_P, counts_P)
    entries_E = np.repeat(ends_P[chosen] - counts_P, counts_P) + within_E
    return Positions(
        kept_counts_P=counts_P,
        kept_ids_E=positions.kept_ids_E[entries_E],
        kept_logp_E=positions.kept_logp_E[entries_E],
        realised_logp_P=positions.realised_logp_P[chosen],
        entropy_P=positions.entropy_P[chosen],
        tail_logsum_PT=positions.tail_logsum_PT[chosen],
    )


def _chunks(positions: Positions) -> Iterator[tuple[slice, slice]]:
    """Runs of positions with about CHUNK_ENTRIES entries, and where these lie."""
    ends_P = np.cumsum(positions.kept_counts_P, dtype=np.int64)
    begin = first_entry = 0
    while begin < positions.num_positions:
        end = max(begin + 1, int(np.searchsorted(ends_P, first_entry + CHUNK_ENTRIES, side="right")))
        yield slice(begin, end), slice(first_entry, int(ends_P[end - 1]))
        begin, first_entry = end, int(ends_P[end - 1])
