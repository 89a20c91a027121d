"""What every source of rows can do, whatever the rows come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from shared.rows import Bool, Row
from student_train.data_config import Manner
from student_train.facts import Facts
from student_train.objective import Tail


@dataclass(frozen=True, kw_only=True)
class Manners:
    """Which rows of a source think."""

    thinks_R: Bool
    """Of the rows that it has now."""
    counts: dict[Manner, int]
    """Of the rows that it had before some were left out."""


class Source(Protocol):
    """Rows in blocks.  Ids are known without reading the rows."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def sample_ids(self) -> Sequence[pa.StringArray]:
        """Of each block."""
        ...

    @property
    def longest_row(self) -> int:
        """In tokens; no row is longer."""
        ...

    @property
    def temperatures(self) -> Sequence[float]:
        """Those that the teacher is known at; none where there is no teacher."""
        ...

    @property
    def tail(self) -> Tail:
        """How far it is known what the teacher said: `none` of a sample with weights, which has no tail; `renormalise`
        of kept ids alone, where the tail was normalised away; otherwise `bucket`."""
        ...

    @property
    def in_pieces(self) -> Sequence[str]:
        """Tokens of the student that its rows spell out, for they were cut by a tokenizer without them."""
        ...

    def at(self, temperature: float | None) -> "Source":
        """With the teacher at one of its temperatures, or without it."""
        ...

    def read_block(self, index: int) -> Sequence[Row]: ...

    def read_outline(self, index: int) -> Sequence[Row]:
        """As `read_block`, but of a teacher what it says of the labels and its entropy alone."""
        ...

    def origins(self, index: int) -> pa.StringArray:
        """What each row of a block says of where it comes from."""
        ...

    @property
    def facts(self) -> Facts | None:
        """Of all rows, where a setting asks for them."""
        ...

    @property
    def manners(self) -> Manners | None:
        """Of all rows, where a setting tells them apart."""
        ...

    def taking(self, is_taken: Sequence[Bool], facts: Facts | None, manners: Manners | None) -> "Source":
        """Of each block the marked rows alone, of which this is known."""
        ...

    def identity(self) -> dict[str, Any]:
        """Equal where blocks, rows and what is said of them are equal."""
        ...

    def record(self) -> dict[str, Any]:
        """What a run trained on, for people."""
        ...
