"""Does a row think before it answers?

What counts is its last supervised span and what directly precedes that in its turn: as far back as the nearest added
token which is no tag, for such begin and end turns.  A row is *reasoning* where anything but white space stands between
an opening and a closing tag there, supervised or not, or where a tag is never closed, as in a row that was cut.  All
others are *fast*, also those whose template writes a pair of tags with nothing in it, in the prompt or in the answer.

Where both tags are tokens of their own, ids are compared and a few tokens decoded; else the whole turn is decoded.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.errors import ConfigError
from shared.rows import Int32, Row, last_span
from student_train.data_config import Manner

USUAL_TAGS = ("<think>", "</think>")
FIRST_THOUGHTS = 16
"""Tokens, which nearly always tell whether there is more than white space."""


def manner_of(thinks: bool) -> Manner:
    return "reasoning" if thinks else "fast"


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Tells rows that think from others, by what stands in them."""

    tokenizer: Tokenizer = field(repr=False)
    tags: tuple[str, str]
    tag_ids: tuple[int, int] | None
    """Where both are tokens of their own, in the rows as well."""
    is_border_V: NDArray[np.bool_] = field(repr=False)
    """Of each id, whether it is an added token that is no tag; the last stands for all ids beyond."""

    @staticmethod
    def of(tokenizer: Tokenizer, tags: tuple[str, str], in_pieces: Collection[str] = ()) -> "Thinking":
        """`in_pieces` are tokens that the rows spell out nevertheless."""
        added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        is_border_V = np.zeros(max(added, default=0) + 2, dtype=np.bool_)
        is_border_V[[token_id for token_id, content in added.items() if content not in tags]] = True
        begin, end = (tokenizer.token_to_id(tag) for tag in tags)
        ids = None if begin is None or end is None or set(tags) & set(in_pieces) else (begin, end)
        return Thinking(tokenizer=tokenizer, tags=tags, tag_ids=ids, is_border_V=is_border_V)

    def thinks(self, row: Row) -> bool:
        begin, end = last_span(row.label_mask_L)
        before = np.minimum(row.input_ids_L[:begin], len(self.is_border_V) - 1)
        borders = np.flatnonzero(self.is_border_V[before])
        turn = row.input_ids_L[(borders[-1] + 1 if len(borders) else 0) : end]
        return self._in_text(turn) if self.tag_ids is None else self._in_ids(turn, *self.tag_ids)

    def _in_ids(self, turn: Int32, opening: int, closing: int) -> bool:
        begin = 0
        while True:
            opened = np.flatnonzero(turn[begin:] == opening)
            if not len(opened):
                return False
            begin += int(opened[0]) + 1
            closed = np.flatnonzero(turn[begin:] == closing)
            if not len(closed) or self._says_something(turn[begin : begin + int(closed[0])]):
                return True
            begin += int(closed[0]) + 1

    def _says_something(self, ids: Int32) -> bool:
        # A character that is cut off decodes to a sign that is no white space.
        first = self._text(ids[:FIRST_THOUGHTS]).replace("\ufffd", "")
        return bool(first.strip()) or bool(self._text(ids).strip())

    def _in_text(self, turn: Int32) -> bool:
        _, opened, rest = self._text(turn).partition(self.tags[0])
        while opened:
            thoughts, closed, rest = rest.partition(self.tags[1])
            if not closed or thoughts.strip():
                return True
            _, opened, rest = rest.partition(self.tags[0])
        return False

    def _text(self, ids: Int32) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False) if len(ids) else ""


def require_known(names: Sequence[str], known: Collection[str], where: str) -> None:
    """Raises ConfigError where a reasoning source is no source of the rows, as if it were spelt wrongly."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"manner.reasoning_sources: {name!r} is no source of {where}",
                next_step=f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known)[:8])}",
            )
