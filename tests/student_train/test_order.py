"""The order: every row once an epoch, shares that are kept, well mixed, and never another one."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.order import Competence, EasyToHard, Order, Pace, Refs, epoch_order

Sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def order_of(
    *sizes: list[int], weights: Any = None, rows_per_step: int = 5, spread: int = 3, seed: int = 0, paces: Any = ()
) -> Order:
    return Order(
        tuple(map(tuple, sizes)),
        tuple(weights or map(sum, sizes)),
        rows_per_step=rows_per_step,
        spread=spread,
        seed=seed,
        paces=tuple(paces),
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


def by_difficulty(sizes: list[int], kind: str, growing: int = 37, begin: float = 0.2) -> tuple[Pace, dict[Any, float]]:
    """A pace with many ties, and the difficulty of each place."""
    numbers = (np.arange(sum(sizes)) * 7 % (1 + sum(sizes) // 2)).astype(np.float64)
    stored = [(block, row) for block, size in enumerate(sizes) for row in range(size)]
    pace = (
        EasyToHard(difficulty_R=numbers)
        if kind == "easy_to_hard"
        else Competence(difficulty_R=numbers, begin=begin, growing_rows=growing)
    )
    return pace, dict(zip(stored, numbers.tolist(), strict=True))


@given(sizes=Sizes, rows=st.integers(1, 11), seed=st.integers(0, 99))
def test_easy_to_hard_gives_every_row_once_an_epoch_in_order_of_difficulty(sizes: list[int], rows: int, seed: int):
    pace, difficulty = by_difficulty(sizes, "easy_to_hard")
    order = order_of(sizes, rows_per_step=rows, seed=seed, paces=[pace])
    seen = [place[1:] for place in flat(order, -(-3 * sum(sizes) // rows))]
    for epoch in range(3):
        rows_of_epoch = seen[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        assert sorted(rows_of_epoch) == sorted(difficulty)
        assert [difficulty[place] for place in rows_of_epoch] == sorted(difficulty.values())


def test_what_is_equally_hard_comes_in_another_order_each_epoch():
    order = order_of([20, 20], rows_per_step=40, paces=[EasyToHard(difficulty_R=np.zeros(40))])
    epochs = [tuple(places(order.step(step))) for step in range(6)]
    assert len(set(epochs)) == 6
    assert epochs == [tuple(places(order_of([20, 20], rows_per_step=40, paces=order.paces).step(s))) for s in range(6)]


@given(
    sizes=Sizes,
    rows=st.integers(1, 11),
    seed=st.integers(0, 99),
    growing=st.integers(1, 120),
    begin=st.floats(0.01, 1.0),
)
def test_competence_never_draws_beyond_its_share_and_then_goes_through_whole_epochs(
    sizes: list[int], rows: int, seed: int, growing: int, begin: float
):
    pace, difficulty = by_difficulty(sizes, "competence", growing, begin)
    order, count = order_of(sizes, rows_per_step=rows, seed=seed, paces=[pace]), sum(sizes)
    seen = [place[1:] for place in flat(order, -(-(growing + 2 * count) // rows))]
    hardest = sorted(difficulty.values())
    for number, place in enumerate(seen[:growing]):
        share = (begin**2 + (1 - begin**2) * number / growing) ** 0.5
        assert difficulty[place] <= hardest[max(1, int(share * count + 1e-9)) - 1]
    for epoch in range(2):
        begin_of = growing + epoch * count
        assert sorted(seen[begin_of : begin_of + count]) == sorted(difficulty)


def test_competence_draws_evenly_from_all_that_it_may():
    """5 standard deviations, in each tenth of the draws; the share that may be drawn grows as a square root."""
    pace = Competence(difficulty_R=np.arange(100.0)[::-1].copy(), begin=0.1, growing_rows=100_000)
    rank_R = 99 - order_of([100], rows_per_step=100_000, paces=[pace]).step(0).row_R
    assert rank_R[:100].max() < 11
    for tenth, ranks in enumerate(np.split(rank_R, 10)):
        shares = np.sqrt(0.01 + 0.99 * (np.arange(10_000) + 10_000 * tenth) / 100_000)
        easiest = np.floor(100 * shares)
        expected = np.array([np.sum((easiest > rank) / easiest) for rank in range(100)])
        assert np.all(np.abs(np.bincount(ranks, minlength=100) - expected) <= 5 * np.sqrt(expected) + 1e-9)


@given(
    kinds=st.lists(st.sampled_from(["easy_to_hard", "competence", "shuffled"]), min_size=1, max_size=3),
    begin=st.integers(0, 40),
    rows=st.integers(1, 11),
    seed=st.integers(0, 2**62),
)
def test_a_step_of_any_pace_is_found_at_once_and_joins_the_one_before(
    kinds: list[str], begin: int, rows: int, seed: int
):
    """So it is all one where a run was resumed, and how many ranks or threads ask for steps."""
    sizes = [[3, 1, 4], [1, 5], [9, 2, 6]][: len(kinds)]
    paces = [
        None if kind == "shuffled" else by_difficulty(size, kind)[0] for size, kind in zip(sizes, kinds, strict=True)
    ]
    options = {"weights": [2.5, 1, 4][: len(kinds)], "seed": seed, "paces": paces}
    double = order_of(*sizes, rows_per_step=2 * rows, **options).step(begin)
    later, earlier = (order_of(*sizes, rows_per_step=rows, **options).step(2 * begin + n) for n in (1, 0))
    assert places(earlier) + places(later) == places(double)


def test_a_pace_changes_nothing_of_which_source_comes_when_nor_of_the_other_sources():
    sizes = [[6, 6], [5, 4]]
    plain = order_of(*sizes, weights=[3, 1])
    for kind in ("easy_to_hard", "competence"):
        paced = order_of(*sizes, weights=[3, 1], paces=[by_difficulty(sizes[0], kind)[0], None])
        for step in range(20):
            one, other = places(plain.step(step)), places(paced.step(step))
            assert [place[0] for place in one] == [place[0] for place in other]
            assert [place for place in one if place[0] == 1] == [place for place in other if place[0] == 1]


def test_paces_are_the_same_in_every_release():
    sizes = [[5, 1, 7], [4, 4]]
    paces = [by_difficulty(sizes[0], "easy_to_hard")[0], by_difficulty(sizes[1], "competence", 50)[0]]
    order = order_of(*sizes, weights=[2.5, 1], rows_per_step=6, spread=2, seed=11, paces=paces)
    told = repr([places(order.step(step)) for step in (0, 1, 7, 40, 10**9)])
    assert hashlib.sha256(told.encode()).hexdigest() == PACED_DIGEST


EXPECTED: list[tuple[int, int, int]] = [(0, 0, 3), (1, 0, 1), (0, 0, 4), (0, 0, 0), (0, 2, 4), (1, 1, 0)]
DIGEST = "943301d0f6724ba1e9c0317793b574615f2f73646f6131662a6b27a41fbf7d76"
PACED_DIGEST = "7431d57fd58f77b41bddb2055313fda8912df07e78bd84e901b8dc78e312128f"
