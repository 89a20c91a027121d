"""Which rows come at which step: arithmetic alone, nothing is read.

The rows of step n are a pure function of (sizes of the blocks, weights, seed, n).  So a run that goes on at any step,
by any number of ranks and loader threads, sees what it would have seen; there is no state of a loader to be saved.

One source: an epoch permutes its blocks.  A row of the b-th of B blocks comes at the time b + M·u mod B, u drawn from
[0, 1): every batch is drawn from the M blocks that are then under way, evenly, and a block is needed for M block
lengths.  With M ≥ B that is a uniform permutation of all rows.  Several sources: the k-th row of source s, of all its
epochs, comes at the time (k + ½) / w_s, so that after any number of rows each source has its share within one.

A source whose rows have a difficulty may come in another order, its `Pace`: `EasyToHard` or `Competence`.  Either is as
much a pure function of the row's number k, and changes nothing of which source comes when.

Random numbers are the raw words of PCG64 and the words that SeedSequence makes of seeds, whose values numpy promises
never to change; those of its distributions may.

Memory: 8 bytes for each row of the epochs under way; with a pace 8 more for the difficulty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

DRAWS = 4096
"""Random draws that are made at once; another number would be other rows."""


def uniforms(count: int, *seed: int) -> NDArray[np.float64]:
    """`count` numbers from [0, 1) with 53 random bits, the same for the same seeds for ever."""
    raw: NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(block_sizes: Sequence[int], spread: int, *seed: int) -> Int64:
    """The stored indices of all rows, in the order of one epoch; `spread` is M."""
    num_blocks, num_rows = len(block_sizes), int(sum(block_sizes))
    place_B = np.empty(num_blocks, dtype=np.int64)
    place_B[np.argsort(uniforms(num_blocks, *seed, 0), kind="stable")] = np.arange(num_blocks)
    time_R = np.repeat(place_B, block_sizes) + min(spread, num_blocks) * uniforms(num_rows, *seed, 1)
    return np.argsort(np.where(time_R >= num_blocks, time_R - num_blocks, time_R), kind="stable")


def ranked(difficulty_R: Float64, *seed: int) -> Int64:
    """The stored indices of all rows, easiest first; what is equally hard stands in random order."""
    return np.lexsort((uniforms(len(difficulty_R), *seed, 3), difficulty_R))


@dataclass(frozen=True, kw_only=True, eq=False)
class EasyToHard:
    """Every epoch goes from the easiest row to the hardest; ties come in another order each time.

    Neighbours in difficulty lie anywhere, so all blocks of such a source are soon needed, and stay in memory.
    """

    difficulty_R: Float64
    """Of each row, in the order that rows are stored in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Competence:
    """Each of the first rows is drawn at random, with replacement, from the easiest: of the k-th from the share c(k).

    c(k) = sqrt(begin² + (1 − begin²) k / growing_rows), the square root of Platanios et al., arXiv 1903.09848, equation
    6.  Then come shuffled epochs.  Memory as for `EasyToHard`.
    """

    difficulty_R: Float64
    begin: float
    growing_rows: int
    """That are drawn so."""

    def num_easiest(self, count_R: Int64) -> Int64:
        """How many rows may be drawn for the so many-th row of the source."""
        grown_R = count_R / self.growing_rows
        competence_R = np.sqrt(self.begin**2 + (1.0 - self.begin**2) * grown_R)
        return np.clip((competence_R * len(self.difficulty_R)).astype(np.int64), 1, len(self.difficulty_R))


Pace = EasyToHard | Competence


@dataclass(frozen=True, kw_only=True)
class Refs:
    """Where the rows of a step lie, in the order of the step: source, block of the source, row of the block."""

    source_R: Int64
    block_R: Int64
    row_R: Int64

    def __len__(self) -> int:
        return len(self.source_R)

    def blocks(self) -> list[tuple[int, int]]:
        """Every (source, block) once, in the order of first need."""
        return list(dict.fromkeys(zip(self.source_R.tolist(), self.block_R.tolist(), strict=True)))


@dataclass(frozen=True)
class Order:
    """The rows of every step.

    `block_sizes[s]` are the rows of each block of source s; `weights[s]` is its share of the rows, up to a factor;
    `paces[s]` its own order, None where it is shuffled, as all are where no paces are given.
    """

    block_sizes: tuple[tuple[int, ...], ...]
    weights: tuple[float | Fraction, ...]
    rows_per_step: int
    spread: int
    seed: int
    paces: tuple[Pace | None, ...] = ()
    _whole: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Weights as whole numbers of the same proportions."""
    _orders: dict[int, dict[int, Int64]] = field(init=False, repr=False, compare=False, default_factory=dict)
    """By source and epoch, those that were asked for last: a step may lie in two epochs."""
    _ranks: dict[int, Int64] = field(init=False, repr=False, compare=False, default_factory=dict)
    """By source, of those that are drawn from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "paces", self.paces or (None,) * len(self.block_sizes))
        assert len(self.paces) == len(self.block_sizes)
        for pace, sizes in zip(self.paces, self.block_sizes, strict=True):
            assert pace is None or len(pace.difficulty_R) == sum(sizes)
        assert 0 < len(self.block_sizes) == len(self.weights)
        assert min(*map(sum, self.block_sizes), *self.weights) > 0
        fractions = [Fraction(str(weight)) for weight in self.weights]  # the number that was written
        scale = math.lcm(*(each.denominator for each in fractions))
        whole = [int(each * scale) for each in fractions]
        object.__setattr__(self, "_whole", tuple(each // math.gcd(*whole) for each in whole))

    @property
    def num_rows(self) -> int:
        """Of one epoch of every source."""
        return sum(map(sum, self.block_sizes))

    def step(self, step: int) -> Refs:
        """The rows of a step, counted from 0; rows cross the borders of epochs."""
        source_R, count_R = self._shares(step * self.rows_per_step, self.rows_per_step)
        block_R, row_R = np.empty_like(source_R), np.empty_like(source_R)
        for source, sizes in enumerate(self.block_sizes):
            is_of = source_R == source
            stored = self._stored(source, count_R[is_of])
            ends = np.cumsum(sizes)
            block_R[is_of] = blocks = np.searchsorted(ends, stored, side="right")
            row_R[is_of] = stored - (ends - sizes)[blocks]
        return Refs(source_R=source_R, block_R=block_R, row_R=row_R)

    def _shares(self, begin: int, count: int) -> tuple[Int64, Int64]:
        """Of rows begin … begin + count: the source of each, and the how many-th of all rows of that source it is."""
        whole, total, num_sources = self._whole, sum(self._whole), len(self._whole)
        # A source has floor(w·τ + ½) rows up to the time τ.  Over all sources that is within S/2 of W·τ.
        first = [max(0, (2 * (begin - num_sources) * w + total) // (2 * total)) for w in whole]
        last = [(2 * (begin + count + num_sources) * w + total) // (2 * total) for w in whole]
        scale = math.lcm(*whole)
        due = sorted(
            ((2 * k + 1) * (scale // w), source, k)
            for source, w in enumerate(whole)
            for k in range(first[source], last[source])
        )[begin - sum(first) :][:count]
        assert len(due) == count
        return np.array([source for _, source, _ in due]), np.array([k for _, _, k in due])

    def _stored(self, source: int, count_R: Int64) -> Int64:
        """Stored indices of the so many-th rows of a source, of all its epochs."""
        pace = self.paces[source]
        if not isinstance(pace, Competence):
            return self._of_epochs(source, count_R)
        stored_R, is_drawn = np.empty_like(count_R), count_R < pace.growing_rows
        stored_R[is_drawn] = self._drawn(source, pace, count_R[is_drawn])
        stored_R[~is_drawn] = self._of_epochs(source, count_R[~is_drawn] - pace.growing_rows)
        return stored_R

    def _of_epochs(self, source: int, count_R: Int64) -> Int64:
        sizes = self.block_sizes[source]
        epoch_R, place_R = np.divmod(count_R, sum(sizes))
        stored_R = np.empty_like(count_R)
        for epoch in np.unique(epoch_R).tolist():
            is_of = epoch_R == epoch
            stored_R[is_of] = self._epoch(source, epoch)[place_R[is_of]]
        return stored_R

    def _drawn(self, source: int, pace: Competence, count_R: Int64) -> Int64:
        draw_R, (run_R, place_R) = np.empty(len(count_R)), np.divmod(count_R, DRAWS)
        for run in np.unique(run_R).tolist():
            is_of = run_R == run
            draw_R[is_of] = uniforms(DRAWS, self.seed, source, run, 2)[place_R[is_of]]
        ranks = self._ranks.get(source)
        if ranks is None:
            ranks = self._ranks[source] = ranked(pace.difficulty_R, self.seed, source, 0)
        return ranks[(draw_R * pace.num_easiest(count_R)).astype(np.int64)]

    def _epoch(self, source: int, epoch: int) -> Int64:
        kept = self._orders.setdefault(source, {})
        order = kept.get(epoch)  # other threads may ask for steps as well
        if order is None:
            pace, seed = self.paces[source], (self.seed, source, epoch)
            order = kept[epoch] = (
                ranked(pace.difficulty_R, *seed)
                if isinstance(pace, EasyToHard)
                else epoch_order(self.block_sizes[source], self.spread, *seed)
            )
            for other in [each for each in list(kept) if abs(each - epoch) > 1]:
                kept.pop(other, None)
        return order
