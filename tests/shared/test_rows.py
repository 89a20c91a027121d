"""Rows refuse to be built misaligned, so nothing downstream has to ask."""

from typing import Any

import numpy as np
import pytest

from shared.errors import MisalignedRowError
from shared.rows import LogitRow, Positions, Row


def positions(counts: list[int], **changes: Any) -> Positions:
    num_positions, num_entries = len(counts), sum(counts)
    values: dict[str, Any] = {
        "kept_counts_P": np.array(counts, np.int32),
        "kept_ids_E": np.arange(num_entries, dtype=np.int32),
        "kept_logp_E": np.full(num_entries, -3.0, np.float32),
        "realised_logp_P": np.full(num_positions, -1.0, np.float32),
        "entropy_P": np.ones(num_positions, np.float32),
        "tail_logsum_PT": np.full((num_positions, 1), -2.0, np.float32),
    }
    return Positions(**{**values, **changes})


def row(mask: list[bool], **changes: Any) -> dict[str, Any]:
    ids = np.arange(len(mask), dtype=np.int32) + 10
    return {"sample_id": "s", "input_ids_L": ids, "label_mask_L": np.array(mask, dtype=bool), **changes}


def test_a_position_is_read_one_token_before_its_label():
    built = Row(**row([False, False, True, True, False, True]))
    assert built.label_ids_P.tolist() == [12, 13, 15]
    assert built.source_index_P.tolist() == [1, 2, 4]
    assert (built.num_tokens, built.num_positions) == (6, 3)


def test_a_supervised_first_token_is_refused():
    with pytest.raises(MisalignedRowError, match="nothing precedes it"):
        Row(**row([True, False]))


@pytest.mark.parametrize("counts", [[2, 2], [2, 2, 2, 2]])
def test_one_distribution_too_few_or_too_many_is_refused(counts: list[int]):
    """vLLM's None at the front and its k+1 entries both end here."""
    with pytest.raises(MisalignedRowError, match="3 supervised tokens need 3 distributions"):
        LogitRow(**row([False, True, True, True]), teacher=positions(counts))


def test_entries_that_do_not_add_up_are_refused():
    short = positions([2, 3], kept_ids_E=np.arange(4, dtype=np.int32))
    with pytest.raises(MisalignedRowError, match="5 kept entries counted, but 4 ids"):
        LogitRow(**row([False, True, True]), teacher=short)


def test_splitting_undoes_concatenating():
    parts = [positions([1, 3]), positions([2]), positions([]), positions([4, 1, 1])]
    back = Positions.concatenate(parts).split([part.num_positions for part in parts])
    for one, other in zip(parts, back, strict=True):
        for name in vars(one):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_mapping_moves_mass_to_the_tail_and_loses_none():
    """A student with less padding than its teacher: what it has no id for is tail, at every temperature."""
    before = positions([3, 2, 2], kept_ids_E=np.array([1, 8, 9, 2, 3, 8, 9], np.int32))
    before = Positions(**{**vars(before), "tail_logsum_PT": np.array([[-2, -1], [-3, -1], [-np.inf] * 2], np.float32)})
    after = before.mapped(np.where(np.arange(10) < 8, np.arange(10), -1), 8, [1.0, 2.0])
    assert after.kept_counts_P.tolist() == [1, 2, 0]
    assert after.kept_ids_E.tolist() == [1, 2, 3]
    for j, temperature in enumerate((1.0, 2.0)):
        folded = 2 * np.exp(-3.0 / temperature)
        expected = np.log(np.exp(before.tail_logsum_PT[:, j].astype(float)) + np.array([folded, 0, folded]))
        np.testing.assert_allclose(after.tail_logsum_PT[:, j], expected, rtol=1e-6)
    assert before.mapped(np.arange(10), 10, [1.0, 2.0]) is before
