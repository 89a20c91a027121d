"""The student's stream: the rows of every step, read ahead and held as long as they are needed.

Which rows those are is settled in `student_train.order`, without reading one.  Here their blocks are read, by threads,
before the step that needs them; whatever goes wrong with a block reaches the one who asks for a step that needs it, and
not before.

Memory: `shuffle_blocks` decoded blocks of each source and those that are read ahead; for the length of a block at the
border of two epochs the blocks of both.  Reads: every block once an epoch, but for one that `shuffle_blocks` exceed,
where those at its border are read twice.  A source that comes by difficulty is another matter: its neighbours lie in
blocks all over, so each of them is read once, most of them before the first step, and all stay in memory.
"""

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.overlap import MadeAhead
from shared.records import asked_of, first_of_repeats
from shared.rows import Row
from student_train.order import Order, Pace, Refs
from student_train.sources import Source

T = TypeVar("T")

STEPS_AHEAD = 2
"""That are ready before they are asked for."""


def is_held_out(sample_id: str, fraction: float) -> bool:
    """A hash of the sample id alone: the same rows on every machine, whatever else is in the data.

    Repeats of one content land on the side of the first, and rollouts on that of the row whose prompt they answer.
    """
    digest = hashlib.sha256(first_of_repeats(asked_of(sample_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Some of the rows of a source; blocks without any of them are left out."""

    source: Source
    blocks: list[int]
    rows: list[NDArray[np.int32]]
    """Of each of these blocks."""

    @staticmethod
    def of(source: Source, takes: Callable[[str], bool]) -> "Selection":
        """The rows whose sample id `takes` takes."""
        return Selection.where(
            source, [np.array(list(map(takes, block.to_pylist())), bool) for block in source.sample_ids]
        )

    @staticmethod
    def where(source: Source, is_taken: Sequence[NDArray[np.bool_]]) -> "Selection":
        """The rows that are marked, block by block."""
        rows = [np.flatnonzero(marks).astype(np.int32) for marks in is_taken]
        blocks = [index for index, some in enumerate(rows) if len(some)]
        return Selection(source=source, blocks=blocks, rows=[rows[index] for index in blocks])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each block."""
        return tuple(map(len, self.rows))

    @property
    def num_rows(self) -> int:
        """Of all blocks together."""
        return sum(self.sizes)

    def marks(self) -> NDArray[np.bool_]:
        """Of all rows of the source, in its order, which it has."""
        sizes = [len(block) for block in self.source.sample_ids]
        begins, is_taken_R = np.cumsum([0, *sizes]), np.zeros(sum(sizes), dtype=np.bool_)
        for block, rows in zip(self.blocks, self.rows, strict=True):
            is_taken_R[begins[block] + rows] = True
        return is_taken_R

    def read(self, index: int) -> list[Row]:
        """The rows of one of its blocks."""
        block = self.source.read_block(self.blocks[index])
        return [block[row] for row in self.rows[index]]

    def in_order(self, rows_at_once: int) -> Iterator[list[Row]]:
        """All rows in the order of the source, so many at a time; for evaluation."""
        rows = (row for index in range(len(self.blocks)) for row in self.read(index))
        while batch := list(islice(rows, rows_at_once)):
            yield batch


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The rows of a step, which is counted from 0."""

    step: int
    rows: list[Row]


class Stream:
    """The rows of several selections, mixed by weight, epoch after epoch.

    `weights` are their shares of the rows, up to a factor; None takes as many as each has.  `paces` are the orders of
    those that are not shuffled.  None of the selections is empty.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        *,
        weights: Sequence[float | Fraction] | None = None,
        paces: Sequence[Pace | None] = (),
        rows_per_step: int,
        seed: int,
        shuffle_blocks: int,
        num_threads: int = 1,
    ) -> None:
        self._selections, self._num_threads = list(selections), num_threads
        self.order = Order(
            block_sizes=tuple(selection.sizes for selection in selections),
            weights=tuple(weights or (selection.num_rows for selection in selections)),
            rows_per_step=rows_per_step,
            spread=shuffle_blocks,
            seed=seed,
            paces=tuple(paces),
        )

    @property
    def num_rows(self) -> int:
        """Of one epoch of every selection."""
        return self.order.num_rows

    def steps(self, first: int, last: int, stop: threading.Event | None = None) -> Iterator[StepRows]:
        """The rows of steps first … last − 1, or until `stop` is set."""
        upcoming, asked = deque[Refs](), first
        with ThreadPoolExecutor(self._num_threads, "shards") as threads:
            blocks = _Blocks(self._read, threads, self._patience())
            try:
                for step in range(first, last):
                    while asked < min(last, step + 1 + self._num_steps_ahead()):
                        upcoming.append(self.order.step(asked))
                        blocks.ask_for(upcoming[-1].blocks(), asked)
                        asked += 1
                    refs = upcoming.popleft()
                    found = {block: blocks.rows(block, step) for block in refs.blocks()}
                    if stop is not None and stop.is_set():
                        return
                    places = zip(refs.source_R.tolist(), refs.block_R.tolist(), refs.row_R.tolist(), strict=True)
                    yield StepRows(step=step, rows=[found[source, block][row] for source, block, row in places])
                    blocks.let_go(step, asked)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def made_ahead(self, first: int, last: int, make: Callable[[StepRows], T]) -> MadeAhead[T]:
        """What `make` makes of the rows of each step, in a thread of its own and before it is asked for."""
        stop = threading.Event()
        return MadeAhead(map(make, self.steps(first, last, stop)), STEPS_AHEAD, stop)

    def _read(self, block: tuple[int, int]) -> list[Row]:
        source, index = block
        return self._selections[source].read(index)

    def _patience(self) -> list[float]:
        """For how many steps a block of each source may go unused before it is taken to be done with.

        Its rows come evenly spread among those of M blocks: one in M/share rows.  That eight times as many pass without
        one happens once in 3,000 times, and then it is read again.  Where rows come by difficulty, the next one may be
        anywhere.
        """
        order, total = self.order, sum(self.order.weights)
        gaps = [
            min(order.spread, len(each.blocks)) * total / weight
            for each, weight in zip(self._selections, order.weights, strict=True)
        ]
        return [
            STEPS_AHEAD + math.ceil(8 * gap / order.rows_per_step) if pace is None else math.inf
            for gap, pace in zip(gaps, order.paces, strict=True)
        ]

    def _num_steps_ahead(self) -> int:
        """As many as use up a block, so that the next one is read before it is needed."""
        num_blocks = sum(len(each.blocks) for each in self._selections)
        return max(STEPS_AHEAD, self.num_rows // num_blocks // self.order.rows_per_step)


class _Blocks:
    """Blocks that are read by threads and held until no step has asked for them for a while."""

    def __init__(
        self, read: Callable[[tuple[int, int]], list[Row]], threads: ThreadPoolExecutor, patience: Sequence[float]
    ) -> None:
        self._read, self._threads, self._patience = read, threads, patience
        self._held: dict[tuple[int, int], Future[list[Row]]] = {}
        self._last_step: dict[tuple[int, int], int] = {}

    def ask_for(self, blocks: Iterable[tuple[int, int]], step: int) -> None:
        for block in blocks:
            if block not in self._held:
                self._held[block] = self._threads.submit(self._read, block)
            self._last_step[block] = step

    def rows(self, block: tuple[int, int], step: int) -> list[Row]:
        """Waits for them; raises what came up when they were read."""
        self.ask_for([] if block in self._held else [block], step)
        return self._held[block].result()

    def let_go(self, done: int, asked: int) -> None:
        """Of all steps before `asked`, those up to `done` are done."""
        for (source, index), last in list(self._last_step.items()):
            if last <= done and last < asked - self._patience[source]:
                self._held.pop((source, index)).cancel()
                del self._last_step[source, index]
