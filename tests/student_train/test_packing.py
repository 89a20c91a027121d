"""Packing: every row once, never more than fits, few lines, and ranks that have about as much to do."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.packing import Shape, best_fit_decreasing, cut_into_passes, dealt, packed_lines, size

Lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def shape(batch_tokens: int, line_tokens: int | None, *, is_static: bool = False) -> Shape:
    return Shape(batch_tokens=batch_tokens, line_tokens=line_tokens, is_static=is_static)


@given(lengths=Lengths, capacity=st.integers(1, 100))
def test_lines_hold_every_row_once_and_no_more_than_fits(lengths: list[int], capacity: int):
    lines = best_fit_decreasing(lengths, capacity)
    assert sorted(chain(*lines)) == list(range(len(lengths)))
    for line in lines:
        assert sum(lengths[index] for index in line) <= capacity or len(line) == 1


@given(lengths=Lengths, capacity=st.integers(60, 100))
def test_lines_are_few(lengths: list[int], capacity: int):
    """Johnson's bound, with the least that any packing needs instead of the best one's number."""
    least = max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))
    assert len(best_fit_decreasing(lengths, capacity)) <= 11 / 9 * max(least, _best(lengths, capacity, least)) + 1


def _best(lengths: list[int], capacity: int, least: int) -> int:
    """Of the packings that put each row into the first line it fits in, in four orders."""
    orders = (sorted(lengths, reverse=True), sorted(lengths), lengths, lengths[::-1])
    found = []
    for order in orders:
        lines: list[int] = []
        for length in order:
            place = next((i for i, fill in enumerate(lines) if fill + length <= capacity), None)
            if place is None:
                lines.append(length)
            else:
                lines[place] += length
        found.append(len(lines))
    return max(least, min(found))


def test_a_row_goes_where_it_leaves_least_room():
    assert best_fit_decreasing([6, 5, 3, 4, 2], 10) == [[0, 3], [1, 2, 4]]
    assert best_fit_decreasing([7, 6, 3], 10) == [[0, 2], [1]], "the fuller line, not the emptier one"


def test_ties_are_broken_by_place_so_that_all_ranks_agree():
    assert best_fit_decreasing([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


@given(
    lengths=Lengths,
    batch_tokens=st.integers(1, 300),
    ranks=st.integers(1, 5),
    packing=st.integers(0, 2),
    static=st.booleans(),
)
def test_the_passes_of_all_ranks_hold_every_row_once(
    lengths: list[int], batch_tokens: int, ranks: int, packing: int, static: bool
):
    line_tokens = [None, batch_tokens, max(lengths)][packing]
    wanted = shape(batch_tokens, line_tokens, is_static=static and packing > 0)
    cut = cut_into_passes(lengths, wanted, ranks)
    rows = [index for share in cut.passes for lines in share for line in lines for index in line]
    assert sorted(rows) == list(range(len(lengths)))
    assert len({len(share) for share in cut.passes}) == 1, "ranks meet in every pass"
    computed = 0
    for lines in chain(*cut.passes):
        height, width = size(lines, lengths, wanted)
        assert all(sum(lengths[index] for index in line) <= width for line in lines)
        assert height * width <= max(batch_tokens, max(lengths), line_tokens or 0)
        assert height >= len(lines)
        computed += height * width
    assert cut.waste == pytest.approx(1 - sum(lengths) / computed)
    for share in cut.passes:
        if [] in share:
            assert all(len(line) == 1 and len(lines) == 1 for lines in share for line in lines), "none could be halved"
    if packing == 1 and not static and not any([] in share for share in cut.passes):
        assert cut.waste == 0


@given(lengths=Lengths, capacity=st.integers(60, 200), ranks=st.integers(1, 5))
def test_static_passes_have_one_shape(lengths: list[int], capacity: int, ranks: int):
    wanted = shape(400, capacity, is_static=True)
    cut = cut_into_passes(lengths, wanted, ranks)
    assert {size(lines, lengths, wanted) for share in cut.passes for lines in share} == {(400 // capacity, capacity)}


def test_ranks_have_about_as_many_tokens():
    lengths = [(37 * n) % 500 + 20 for n in range(256)]
    for packed in (None, 2048):
        cut = cut_into_passes(lengths, shape(2048, packed), 8)
        loads = [sum(lengths[i] for lines in share for line in lines for i in line) for share in cut.passes]
        assert max(loads) < 1.05 * min(loads)


def test_where_lines_would_not_divide_among_the_ranks_there_are_a_few_more_and_evenly_full():
    lengths = [10] * 12
    assert len(packed_lines(lengths, 60, 1)) == 2
    assert [len(line) for line in packed_lines(lengths, 60, 4)] == [3, 3, 3, 3]


def test_of_more_ranks_than_rows_some_take_part_in_silence():
    cut = cut_into_passes([5, 3], shape(8, 8), 4)
    assert sorted(cut.passes) == [[[]], [[]], [[[0]]], [[[1]]]]
    assert cut.waste == pytest.approx(1 - 8 / (5 + 3 + 3 + 3)), "a silent pass is made of the shortest row"


def test_a_rank_with_fewer_passes_halves_its_own_before_it_is_silent():
    cut = cut_into_passes([8, 8, 8, 4, 4], shape(8, 8), 3)
    assert sorted(map(len, cut.passes)) == [2, 2, 2]
    assert sum(lines == [] for share in cut.passes for lines in share) == 1


@given(sizes=st.lists(st.integers(1, 50), max_size=60), num_shares=st.integers(1, 7))
def test_what_is_dealt_differs_by_no_more_than_its_largest(sizes: list[int], num_shares: int):
    loads = [sum(sizes[index] for index in share) for share in dealt(sizes, num_shares)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)
