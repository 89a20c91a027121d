"""The student's stream: the rows of every step, read ahead and held as long as they are needed.

Which rows those are is settled in `student_train.order`, without reading one.  Here their blocks are read, by threads,
before the step that needs them; whatever goes wrong with a block reaches the one who asks for a step that needs it, and
not before.

Memory: `shuffle_blocks` decoded blocks of each source, and those that are read ahead.
"""

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.overlap import made_ahead
from shared.records import first_of_repeats
from shared.rows import Row
from student_train.order import Order, Refs
from student_train.sources import Source

T = TypeVar("T")

STEPS_AHEAD = 2
"""That are ready before they are asked for."""


def is_held_out(sample_id: str, fraction: float) -> bool:
    """A hash of the sample id alone: the same rows on every machine, whatever else is in the data.

    Repeats of one content land on the side of the first.
    """
    digest = hashlib.sha256(first_of_repeats(sample_id).encode()).digest()
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
        rows = [
            np.flatnonzero([takes(name) for name in block.to_pylist()]).astype(np.int32) for block in source.sample_ids
        ]
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

    `weights` are their shares of the rows, up to a factor; None takes as many as each has.

    Raises:
        ConfigError: there is not one row.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        *,
        weights: Sequence[float] | None = None,
        rows_per_step: int,
        seed: int,
        shuffle_blocks: int,
        num_threads: int = 1,
    ) -> None:
        if not all(selection.num_rows for selection in selections):
            raise ConfigError("no row is left to train on", next_step="hold out a smaller fraction")
        self._selections, self._num_threads = list(selections), num_threads
        self.order = Order(
            block_sizes=tuple(selection.sizes for selection in selections),
            weights=tuple(weights or (selection.num_rows for selection in selections)),
            rows_per_step=rows_per_step,
            spread=shuffle_blocks,
            seed=seed,
        )

    @property
    def num_rows(self) -> int:
        """Of one epoch of every selection."""
        return self.order.num_rows

    def steps(self, first: int, last: int) -> Iterator[StepRows]:
        """The rows of steps first … last − 1."""
        order, upcoming, asked = self.order, deque[Refs](), first
        with ThreadPoolExecutor(self._num_threads, "shards") as threads:
            blocks = _Blocks(self._read, threads, self._num_blocks_held())
            try:
                for step in range(first, last):
                    while asked < min(last, step + 1 + self._num_steps_ahead()):
                        upcoming.append(order.step(asked))
                        blocks.ask_for(upcoming[-1].blocks())
                        asked += 1
                    refs = upcoming.popleft()
                    found = {block: blocks.rows(block) for block in refs.blocks()}
                    places = zip(refs.source_R.tolist(), refs.block_R.tolist(), refs.row_R.tolist(), strict=True)
                    yield StepRows(step=step, rows=[found[source, block][row] for source, block, row in places])
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def made_ahead(self, first: int, last: int, make: Callable[[StepRows], T]) -> Iterator[T]:
        """What `make` makes of the rows of each step, in a thread of its own and before it is asked for."""
        stop = threading.Event()
        steps = self.steps(first, last)
        made = (make(rows) for rows in steps if not stop.is_set())
        return made_ahead(made, STEPS_AHEAD, stop)

    def _read(self, block: tuple[int, int]) -> list[Row]:
        source, index = block
        return self._selections[source].read(index)

    def _num_blocks_held(self) -> int:
        """Those that a batch is drawn from, and of each source one more that is read ahead for each thread."""
        spread = self.order.spread
        return sum(min(spread, len(each.blocks)) + 1 + self._num_threads for each in self._selections)

    def _num_steps_ahead(self) -> int:
        """As many as use up a block, so that the next one is read before it is needed."""
        num_blocks = sum(len(each.blocks) for each in self._selections)
        return max(STEPS_AHEAD, self.num_rows // num_blocks // self.order.rows_per_step)


class _Blocks:
    """Blocks that are read by threads and held until others take their place: those that were used least recently."""

    def __init__(
        self, read: Callable[[tuple[int, int]], list[Row]], threads: ThreadPoolExecutor, num_held: int
    ) -> None:
        self._read, self._threads, self._num_held = read, threads, num_held
        self._held: OrderedDict[tuple[int, int], Future[list[Row]]] = OrderedDict()

    def ask_for(self, blocks: Iterable[tuple[int, int]]) -> None:
        for block in blocks:
            if block not in self._held:
                self._held[block] = self._threads.submit(self._read, block)
            self._held.move_to_end(block)
        while len(self._held) > self._num_held:
            self._held.popitem(last=False)[1].cancel()

    def rows(self, block: tuple[int, int]) -> list[Row]:
        """Waits for them; raises what came up when they were read."""
        if block not in self._held:  # was put away too early
            self.ask_for([block])
        return self._held[block].result()
