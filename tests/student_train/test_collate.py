"""Arrays become targets only where a loss can be right about them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.rows import Positions
from student_train.collate import KEPT_MULTIPLE, make_targets

V = 100
LABELS, WEIGHTS = np.array([4, 99, 0]), np.ones(3)


def positions(**changes: Any) -> Positions:
    """Three positions that keep two ids, one and none."""
    return replace(
        Positions(
            kept_counts_P=np.array([2, 1, 0], np.int32),
            kept_ids_E=np.array([3, 50, 7], np.int32),
            kept_logp_E=np.array([-0.5, -2.0, -0.1], np.float32),
            realised_logp_P=np.zeros(3, np.float32),
            entropy_P=np.ones(3, np.float32),
            tail_logsum_PT=np.array([[-1.3, -1.0], [-np.inf, -np.inf], [0.0, 0.5]], np.float32),
        ),
        **changes,
    )


def test_kept_ids_become_a_rectangle_padded_with_the_first():
    targets = make_targets(LABELS, WEIGHTS, positions(), temperature_index=1, vocab_size=V)
    assert targets.kept_ids_NK.shape == (3, KEPT_MULTIPLE)
    assert targets.is_kept_NK.sum(dim=1).tolist() == [2, 1, 0]
    assert targets.kept_ids_NK[0].tolist() == [3, 50] + [3] * (KEPT_MULTIPLE - 2)
    assert targets.kept_ids_NK[1].tolist() == [7] * KEPT_MULTIPLE
    assert targets.tail_logsum_N.tolist() == [-1.0, -np.inf, 0.5]


def test_a_teacher_that_keeps_nothing_in_a_batch_is_still_a_teacher():
    silent = positions(
        kept_counts_P=np.zeros(3, np.int32),
        kept_ids_E=np.zeros(0, np.int32),
        kept_logp_E=np.zeros(0, np.float32),
        tail_logsum_PT=np.zeros((3, 1), np.float32),
    )
    assert make_targets(LABELS, WEIGHTS, silent, vocab_size=V).num_kept == KEPT_MULTIPLE
    assert make_targets(LABELS, WEIGHTS, None, vocab_size=V).num_kept == 0


@given(st.lists(st.sets(st.integers(0, V - 1), max_size=40), min_size=1, max_size=8), st.randoms())
def test_every_kept_entry_lands_at_its_position_in_any_order(kept: list[set[int]], random: Any):
    lists = [random.sample(sorted(ids), len(ids)) for ids in kept]
    flat = np.array([i for ids in lists for i in ids], np.int32)
    n = len(kept)
    teacher = Positions(
        kept_counts_P=np.array([len(ids) for ids in lists], np.int32),
        kept_ids_E=flat,
        kept_logp_E=(-flat - 1).astype(np.float32),
        realised_logp_P=np.zeros(n, np.float32),
        entropy_P=np.zeros(n, np.float32),
        tail_logsum_PT=np.zeros((n, 1), np.float32),
    )
    targets = make_targets(np.zeros(n, int), np.ones(n), teacher, vocab_size=V)
    for row, ids in enumerate(lists):
        mask = targets.is_kept_NK[row]
        assert targets.kept_ids_NK[row][mask].tolist() == ids
        assert torch.equal(targets.kept_logp_NK[row][mask], -targets.kept_ids_NK[row][mask].float() - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_logp_E": np.array([-0.5, -np.inf, -0.1], np.float32)}, "position 0: .*log-probability that is finite"),
        ({"kept_logp_E": np.array([-0.5, -1.0, np.nan], np.float32)}, "position 1: .*log-probability that is finite"),
        ({"kept_ids_E": np.array([50, 50, 7], np.int32)}, "position 0: expected each kept id once, got 50"),
        ({"kept_ids_E": np.array([3, 100, 7], np.int32)}, r"position 0: .*in \[0, 100\), got 100"),
        ({"kept_ids_E": np.array([3, 50, -7], np.int32)}, "position 1: .*got -7"),
        ({"kept_counts_P": np.array([2, 2, 0], np.int32)}, "their counts differ"),
        ({"kept_counts_P": np.array([2, 1], np.int32)}, "3 labels need as many distributions, got 2"),
        ({"entropy_P": np.array([1, np.inf, 1], np.float32)}, "position 1: expected a finite entropy"),
        ({"tail_logsum_PT": np.array([[0], [np.nan], [0]], np.float32)}, "position 1: expected a tail"),
        ({"tail_logsum_PT": np.array([[np.inf], [0], [0]], np.float32)}, "position 0: expected a tail"),
        ({"tail_logsum_PT": np.array([[0], [0], [-np.inf]], np.float32)}, "position 2: expected a kept id or a tail"),
    ],
)
def test_what_no_loss_can_be_right_about_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_targets(LABELS, WEIGHTS, positions(**changes), vocab_size=V)


def test_a_repeat_is_found_wherever_it_stands():
    teacher = positions(
        kept_counts_P=np.array([2, 4, 0], np.int32),
        kept_ids_E=np.array([9, 3, 9, 8, 3, 9], np.int32),
        kept_logp_E=np.zeros(6, np.float32),
    )
    with pytest.raises(ValueError, match="position 1: expected each kept id once, got 9"):
        make_targets(LABELS, WEIGHTS, teacher, vocab_size=V)


@pytest.mark.parametrize("labels", [[4, 100, 0], [4, -100, 0]])
def test_a_label_outside_the_vocabulary_is_refused(labels: list[int]):
    with pytest.raises(ValueError, match=r"position 1: expected a label in \[0, 100\)"):
        make_targets(np.array(labels), WEIGHTS, None, vocab_size=V)


@pytest.mark.parametrize("weights", [[1, -1, 1], [1, np.nan, 1], [1, np.inf, 1]])
def test_a_weight_that_is_none_is_refused(weights: list[float]):
    with pytest.raises(ValueError, match="position 1: expected a finite weight"):
        make_targets(LABELS, np.array(weights), None, vocab_size=V)
