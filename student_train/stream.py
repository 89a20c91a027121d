"""The student's stream: which rows come at which step is a pure function of (rows, seed), and nothing else.

An epoch permutes the blocks of the source, takes `shuffle_blocks` of them at a time and shuffles their rows together.
So memory is bounded by that many blocks, and every row comes exactly once an epoch.  Text and the dataset made from it
give the same order where their blocks are the same: a dump's `unit_records` is 512 by default, and so is a text's.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from shared.errors import ConfigError
from shared.records import first_of_repeats
from shared.rows import Row
from student_train.sources import Source


def is_held_out(sample_id: str, fraction: float) -> bool:
    """A hash of the sample id alone: the same rows on every machine, whatever else is in the data.

    Repeats of one content land on the side of the first.
    """
    digest = hashlib.sha256(first_of_repeats(sample_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The rows of a source that pass `takes`, epoch after epoch."""

    source: Source
    takes: Callable[[str], bool]
    seed: int
    shuffle_blocks: int

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.takes(sample_id) for block in self.source.sample_ids for sample_id in block)

    def batches(self, rows_per_step: int) -> Iterator[list[Row]]:
        """Batches for ever, crossing the borders of epochs.

        Raises:
            ConfigError: there is not one row.
        """
        if not self.num_rows:
            raise ConfigError("no row is left to train on", next_step="hold out a smaller fraction")
        rows = self._rows()
        while True:
            yield list(islice(rows, rows_per_step))

    def in_order(self, rows_at_once: int) -> Iterator[list[Row]]:
        """One pass in the order of the source, so many rows at a time; for evaluation."""
        blocks = (i for i, sample_ids in enumerate(self.source.sample_ids) if any(map(self.takes, sample_ids)))
        rows = (row for index in blocks for row in self.source.read_block(index) if self.takes(row.sample_id))
        while batch := list(islice(rows, rows_at_once)):
            yield batch

    def _rows(self) -> Iterator[Row]:
        epoch = 0
        while True:
            random = np.random.default_rng([self.seed, epoch])
            blocks = random.permutation(len(self.source.sample_ids))
            for begin in range(0, len(blocks), self.shuffle_blocks):
                pool = [
                    row
                    for index in blocks[begin : begin + self.shuffle_blocks]
                    for row in self.source.read_block(int(index))
                    if self.takes(row.sample_id)
                ]
                yield from (pool[index] for index in random.permutation(len(pool)))
            epoch += 1
