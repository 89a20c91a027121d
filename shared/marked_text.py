"""Text of which it is known, to the character, what is supervised and what only looks like a control token."""

from dataclasses import dataclass

Span = tuple[int, int]
"""Begin and end, in characters."""


@dataclass(frozen=True, kw_only=True)
class MarkedText:
    """`supervised` spans begin where at inference a prompt ends; `left_out` are parts of them that are not learnt.

    `literal` are control tokens that a record spells out: they are text.  `reworded`: an answer is not there as the
    record has it.
    """

    text: str
    supervised: tuple[Span, ...]
    left_out: tuple[Span, ...] = ()
    literal: tuple[Span, ...] = ()
    reworded: bool = False
