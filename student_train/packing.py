"""How the rows of a step are cut into forward passes.  Pure arithmetic on lengths; every rank computes all of it.

Packed, rows stand one behind the other in lines.  Attention and positions do not cross from one to the next, so the
loss and its gradient are those of the rows alone, whatever is packed with what; see `student_train.attention`.

A pass is a list of lines, a line a list of rows, by their indices.  Ranks that share gradients or weights meet in every
pass, so each has as many; one that has nothing to say in a pass takes part in silence, with an empty list.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from shared.batching import batches_by_length

Line = list[int]
Pass = list[Line]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[Line]:
    """Lines of at most `capacity`: the longest row first, each where it leaves least room; a longer one goes alone.

    Never more than 11/9 of the fewest lines possible, and one (Johnson 1974, doi:10.1137/0203025).
    """
    lines: list[Line] = []
    rooms: list[tuple[int, int]] = []  # what is left in each line, least first
    for index in _largest_first(lengths):
        place = bisect_left(rooms, (lengths[index], -1))
        if place < len(rooms):
            room, line = rooms.pop(place)
            lines[line].append(index)
        else:
            room, line = max(capacity, lengths[index]), len(lines)
            lines.append([index])
        insort(rooms, (room - lengths[index], line))
    return lines


def packed_lines(lengths: Sequence[int], capacity: int, num_ranks: int) -> list[Line]:
    """As few lines as best-fit decreasing needs, or a few more and evenly full, so that every rank has as many."""
    lines = best_fit_decreasing(lengths, capacity)
    if missing := -len(lines) % num_ranks:
        even = dealt(lengths, len(lines) + missing)
        if max(sum(lengths[index] for index in line) for line in even) <= max(capacity, max(lengths)):
            return [line for line in even if line]
    return lines


def dealt(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Indices in so many shares of like size: the largest first, each to the share with least."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, share) for share in range(num_shares)]
    for index in _largest_first(sizes):
        load, share = heapq.heappop(loads)
        shares[share].append(index)
        heapq.heappush(loads, (load + sizes[index], share))
    return shares


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a forward pass may look like."""

    batch_tokens: int
    """Of one pass, padding included."""
    line_tokens: int | None
    """What a line is packed to; None leaves every row a line of its own."""
    is_static: bool = False
    """Whether every pass has the same shape, filled up with padding."""

    @property
    def lines_per_pass(self) -> int:
        """Where lines are packed."""
        return max(1, self.batch_tokens // (self.line_tokens or self.batch_tokens))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The passes of every rank, and what is computed beside the rows' tokens."""

    passes: list[list[Pass]]
    """By rank."""
    waste: float
    """Share of the computed tokens that are padding."""


def cut_into_passes(lengths: Sequence[int], shape: Shape, num_ranks: int) -> Cut:
    """The passes of a step's rows, as many for every rank.  Which rows are trained on does not depend on it."""
    if shape.line_tokens is None:
        shares = dealt(lengths, num_ranks)
        passes = [_single_lines(share, lengths, shape.batch_tokens) for share in shares]
    else:
        lines = packed_lines(lengths, shape.line_tokens, num_ranks)
        shares = dealt([sum(lengths[index] for index in line) for line in lines], num_ranks)
        passes = [_grouped([lines[i] for i in share], shape.lines_per_pass) for share in shares]
    passes = _evened(passes)
    sizes = [size(each, lengths, shape) for share in passes for each in share]
    computed = sum(height * width for height, width in sizes)
    return Cut(passes=passes, waste=1 - sum(lengths) / computed)


def size(lines: Pass, lengths: Sequence[int], shape: Shape) -> tuple[int, int]:
    """Lines of a pass, and tokens of each, padding included."""
    lines = lines or [[shortest(lengths)]]
    widest = max(sum(lengths[index] for index in line) for line in lines)
    if shape.is_static and shape.line_tokens is not None:
        return shape.lines_per_pass, max(shape.line_tokens, widest)
    return len(lines), widest


def shortest(lengths: Sequence[int]) -> int:
    """The row that a silent pass is made of."""
    return min(range(len(lengths)), key=lengths.__getitem__)


def _evened(shares: list[list[Pass]]) -> list[list[Pass]]:
    """As many passes for each: the largest are halved, and where nothing is left to halve a pass is silent."""
    most = max(map(len, shares))
    return [_with_passes(share, most) for share in shares]


def _with_passes(share: list[Pass], count: int) -> list[Pass]:
    share = list(share)
    while len(share) < count:
        place = max(range(len(share)), key=lambda i: sum(map(len, share[i])), default=0)
        halves = _halves(share[place]) if share else None
        if halves is None:
            return share + [[] for _ in range(count - len(share))]
        share[place : place + 1] = halves
    return share


def _halves(lines: Pass) -> list[Pass] | None:
    """Two passes of a pass, by its lines or else by the rows of its only line; None where it is one row."""
    if len(lines) > 1:
        return [lines[: len(lines) // 2], lines[len(lines) // 2 :]]
    line = lines[0]
    return [[line[: len(line) // 2]], [line[len(line) // 2 :]]] if len(line) > 1 else None


def _single_lines(share: list[int], lengths: Sequence[int], batch_tokens: int) -> list[Pass]:
    batches = batches_by_length([lengths[index] for index in share], batch_tokens)
    return [[[share[place]] for place in batch] for batch in batches]


def _grouped(lines: list[Line], lines_per_pass: int) -> list[Pass]:
    return [lines[begin : begin + lines_per_pass] for begin in range(0, len(lines), lines_per_pass)]


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
