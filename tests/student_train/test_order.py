"""The order: every row once an epoch, shares that are kept, well mixed, and never another one."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.order import Order, Refs, epoch_order

Sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def order_of(*sizes: list[int], weights: Any = None, rows_per_step: int = 5, spread: int = 3, seed: int = 0) -> Order:
    return Order(
        tuple(map(tuple, sizes)),
        tuple(weights or map(sum, sizes)),
        rows_per_step=rows_per_step,
        spread=spread,
        seed=seed,
    )


def places(refs: Refs) -> list[tuple[int, int, int]]:
    return list(zip(refs.source_R.tolist(), refs.block_R.tolist(), refs.row_R.tolist(), strict=True))


def flat(order: Order, num_steps: int) -> list[tuple[int, int, int]]:
    return [place for step in range(num_steps) for place in places(order.step(step))]


@given(
    sizes=st.lists(Sizes, min_size=1, max_size=3),
    spread=st.integers(1, 9),
    rows=st.integers(1, 11),
    seed=st.integers(0, 99),
)
def test_every_epoch_holds_every_row_of_every_source_once(sizes: list[list[int]], spread: int, rows: int, seed: int):
    order = order_of(*sizes, spread=spread, rows_per_step=rows, seed=seed)
    everything = sorted((s, b, r) for s, each in enumerate(sizes) for b, size in enumerate(each) for r in range(size))
    seen = flat(order, -(-3 * order.num_rows // rows))
    for epoch in range(3):
        assert sorted(seen[epoch * len(everything) : (epoch + 1) * len(everything)]) == everything


@given(
    sizes=st.lists(Sizes, min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 50), min_size=4, max_size=4),
    begin=st.integers(0, 10**12),
    rows=st.integers(1, 40),
)
def test_a_step_far_out_is_found_at_once_and_joins_the_one_before(
    sizes: list[list[int]], weights: list[float], begin: int, rows: int
):
    """Two steps together are what one step of twice the rows is: nothing is lost or repeated between steps."""
    weights = weights[: len(sizes)]
    single = order_of(*sizes, weights=weights, rows_per_step=rows)
    double = order_of(*sizes, weights=weights, rows_per_step=2 * rows)
    assert places(single.step(2 * begin)) + places(single.step(2 * begin + 1)) == places(double.step(begin))


@given(weights=st.lists(st.floats(0.01, 50), min_size=2, max_size=5), num_rows=st.integers(1, 3000))
def test_every_source_has_its_share_after_any_number_of_rows(weights: list[float], num_rows: int):
    order = order_of(*([[7, 5]] * len(weights)), weights=weights, rows_per_step=num_rows)
    counts = Counter(order.step(0).source_R.tolist())
    for source, weight in enumerate(weights):
        assert abs(counts[source] - num_rows * weight / sum(weights)) <= len(weights) / 2 + 0.5


@pytest.mark.parametrize("weights", [[1e-10, 2e-10], [1e-10, 1.0, 1.0], [1e300, 1.0], [1e-9, 1e9], [0.1, 0.2]])
def test_weights_of_any_size_are_shares(weights: list[float]):
    counts = Counter(order_of(*([[7, 5]] * len(weights)), weights=weights, rows_per_step=300).step(7).source_R.tolist())
    for source, weight in enumerate(weights):
        assert counts[source] == pytest.approx(300 * weight / sum(weights), abs=2)


def test_sources_take_turns_and_each_goes_through_its_own_epochs():
    order = order_of([4, 4], [2], weights=[3, 1], rows_per_step=8)
    assert order.step(0).source_R.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    two_steps = Counter(places(order.step(0)) + places(order.step(1)))
    assert sum(two_steps[0, b, r] for b in range(2) for r in range(4)) == 12
    assert [two_steps[1, 0, r] for r in range(2)] == [2, 2], "twice through both of its rows"


def test_the_order_changes_with_seed_epoch_and_source():
    sizes = [50, 50]
    one, again, other = (flat(order_of(sizes, seed=seed), 20) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert one != flat(order_of(sizes, seed=3), 40)[100:], "the second epoch has an order of its own"
    two = flat(order_of(sizes, sizes), 40)
    assert [p[1:] for p in two if p[0] == 0] != [p[1:] for p in two if p[0] == 1]


def test_the_order_is_the_same_in_every_release():
    """Whoever changes it breaks every run that is under way, and the promise that numpy's raw words were taken for."""
    order = order_of([5, 1, 7], [4, 4], weights=[2.5, 1], rows_per_step=6, spread=2, seed=11)
    told = repr([places(order.step(step)) for step in (0, 1, 7, 10**9)])
    assert places(order.step(0)) == EXPECTED
    assert hashlib.sha256(told.encode()).hexdigest() == DIGEST


@pytest.mark.parametrize("spread", [1, 4, 16])
def test_a_batch_is_drawn_from_so_many_blocks(spread: int):
    order = order_of([200] * 40, rows_per_step=200, spread=spread)
    for step in range(40):
        counts = Counter(order.step(step).block_R.tolist())
        assert len(counts) <= spread + 2  # a batch is about as long as a block: one may end in it, and one begin
        if spread > 1:
            assert len(counts) >= min(spread, 0.8 * spread + 1)
            assert max(counts.values()) <= 200 * (1 / spread + 4 / np.sqrt(200 * spread))


def test_with_all_blocks_under_way_the_permutation_is_uniform():
    """Every row is as likely at every place: 5 standard deviations over 20,000 epochs of 6 rows."""
    counts = np.zeros((6, 6))
    for epoch in range(20_000):
        counts[epoch_order([1, 3, 2], 3, 0, 0, epoch), np.arange(6)] += 1
    expected = 20_000 / 6
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


EXPECTED: list[tuple[int, int, int]] = [(0, 0, 3), (1, 0, 1), (0, 0, 4), (0, 0, 0), (0, 2, 4), (1, 1, 0)]
DIGEST = "943301d0f6724ba1e9c0317793b574615f2f73646f6131662a6b27a41fbf7d76"
