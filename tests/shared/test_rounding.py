"""Rounding: the loss is what it is said to be, computed here from its definition in fp64, and within the setting."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rounding import LOWEST, Grid, mass_tolerance, round_positions, storage_loss
from shared.rows import Positions
from tests.shared.made_rows import random_rows

TEMPERATURES = [1.0, 2.0, 0.5]


def teacher(num_positions: int, num_kept: int, seed: int, sharpness: float) -> Positions:
    """The largest of softmax(normal · sharpness) over 2,000 ids, with exact tails."""
    state = np.random.default_rng(seed)
    z = state.normal(size=(num_positions, 2000)) * sharpness
    logp = -np.sort(np.log(np.exp(z).sum(1, keepdims=True)) - z, axis=1)
    kept, rest = logp[:, :num_kept], logp[:, num_kept:]
    tails = np.stack([np.log(np.exp(rest / t).sum(1)) for t in TEMPERATURES], axis=1)
    return Positions(
        kept_counts_P=np.full(num_positions, num_kept, np.int32),
        kept_ids_E=np.tile(np.arange(num_kept, dtype=np.int32), num_positions),
        kept_logp_E=kept.ravel().astype(np.float32),
        realised_logp_P=kept[:, 0].astype(np.float32),
        entropy_P=-(np.exp(logp) * logp).sum(1).astype(np.float32),
        tail_logsum_PT=tails.astype(np.float32),
    )


def kl_by_definition(exact: Positions, stored: Positions, temperature: float, column: int) -> list[float]:
    """Σ p log p/q over kept ids and tail, both normalised, one position at a time."""
    losses = []
    each = [positions.split([1] * positions.num_positions) for positions in (exact, stored)]
    for one, other in zip(*each, strict=True):
        both = [np.append(x.kept_logp_E.astype(float) / temperature, x.tail_logsum_PT[0, column]) for x in (one, other)]
        p, q = (np.exp(x) / np.exp(x).sum() for x in both)
        losses.append(float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()))
    return losses


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("max_kl", [1e-2, 1e-4, 1e-6])
def test_rounding_loses_what_it_says_and_no_more_than_it_may(sharpness: float, max_kl: float):
    exact = teacher(301, 37, seed=int(sharpness * 10), sharpness=sharpness)
    stored, loss_PT = round_positions(exact, TEMPERATURES, max_kl=max_kl)
    for j, temperature in enumerate(TEMPERATURES):
        np.testing.assert_allclose(loss_PT[:, j], kl_by_definition(exact, stored, temperature, j), rtol=2e-3, atol=2e-9)
    assert loss_PT[:, 0].mean() <= max_kl
    # Not needlessly fine either, unless nothing coarser is left to try.
    assert loss_PT[:, 0].mean() > max_kl / 3 or max_kl == 1e-2


def test_few_values_remain_at_the_default_setting():
    """256 are one byte each before zstd; a 257th costs an eighth more of every one."""
    for sharpness in (1.0, 3.0):
        stored, _ = round_positions(teacher(2000, 64, 1, sharpness), TEMPERATURES, max_kl=1e-4)
        assert len(np.unique(stored.kept_logp_E)) <= 256


def test_zero_rounds_nothing():
    exact = teacher(11, 5, 0, 2.0)
    stored, loss_PT = round_positions(exact, TEMPERATURES, max_kl=0.0)
    assert stored is exact
    assert not loss_PT.any()


def test_equal_values_stay_equal_and_smaller_ones_do_not_become_larger():
    """So a kept realised token still has one value, and one that is not kept is still no larger than the tail."""
    values = -np.sort(np.random.default_rng(0).exponential(8, 20_001).astype(np.float32))
    rounded = Grid(0.0155).rounded(values)
    assert (np.diff(rounded) <= 0).all()
    np.testing.assert_array_equal(Grid(0.0155).rounded(rounded), rounded)  # a level rounds to itself


def test_levels_begin_at_certainty_and_lie_closer_where_probability_is():
    levels = Grid(0.0155).levels
    assert levels[0] == 0.0
    assert (np.diff(levels) < 0).all()
    assert (np.diff(np.diff(levels.astype(float))) < 1e-4).all()
    assert LOWEST <= levels[-1] < LOWEST + 10


def test_what_lies_below_the_grid_is_stored_as_it_is():
    values = np.asarray([-150.123, -np.inf, -1e30, -120.5], dtype=np.float32)
    np.testing.assert_array_equal(Grid(0.0155).rounded(values), values)


def test_an_untouched_value_is_not_rounded():
    """Every sampled id has the weight tau: rounded, all of them would be wrong in the same way."""
    tau_logp = float(np.float32(np.log(0.0213)))
    exact = replace(teacher(50, 9, 0, 2.0), tail_logsum_PT=np.zeros((50, 0), np.float32))
    exact.kept_logp_E[::3] = tau_logp
    stored, loss_PT = round_positions(exact, [1.0], max_kl=1e-4, untouched_logp=tau_logp)
    assert (stored.kept_logp_E[::3] == np.float32(tau_logp)).all()
    assert (stored.kept_logp_E[1::3] != exact.kept_logp_E[1::3]).mean() > 0.9
    w, w_stored = np.exp(exact.kept_logp_E.astype(float)), np.exp(stored.kept_logp_E.astype(float))
    expected = (w * np.log(w / w_stored) - w + w_stored).reshape(50, 9).sum(1)
    np.testing.assert_allclose(loss_PT[:, 0], expected, rtol=2e-3, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 30), exponent=st.floats(-7, -2))
def test_any_teacher_is_rounded_within_its_setting(seed: int, num_rows: int, exponent: float):
    """Ragged positions, empty tails, p down to 1e-12, values that are exactly 0."""
    exact = Positions.concatenate([row.teacher for row in random_rows(seed, num_rows, 2)])
    stored, loss_PT = round_positions(exact, [1.0, 2.0], max_kl=10**exponent)
    assert loss_PT[:, 0].mean() <= 10**exponent
    expected = kl_by_definition(exact, stored, 1.0, 0)
    largest = float(np.abs(exact.kept_logp_E - stored.kept_logp_E).max())
    np.testing.assert_allclose(
        loss_PT[:, 0], expected, rtol=1e-2, atol=1e-9 + 2e-6 * largest
    )  # fp32 has so many digits
    np.testing.assert_array_equal(np.isneginf(exact.tail_logsum_PT), np.isneginf(stored.tail_logsum_PT))


def test_storage_loss_is_nothing_where_nothing_changed_and_ignores_what_all_ids_share():
    exact = teacher(7, 5, 0, 1.0)
    assert not storage_loss(exact, exact, TEMPERATURES).any()
    shared = replace(exact, kept_logp_E=exact.kept_logp_E + 0.1, tail_logsum_PT=exact.tail_logsum_PT + np.float32(0.1))
    np.testing.assert_allclose(storage_loss(exact, shared, [1.0]), 0, atol=1e-6)


def test_few_uncertain_positions_among_certain_ones_are_not_rounded_away():
    """Where nearly every position is certain the mean would allow half a nat at those that are not."""
    certain = teacher(4000, 8, 0, 30.0)
    exact = Positions.concatenate([certain, teacher(20, 8, 1, 1.0)])
    stored, loss_PT = round_positions(exact, [1.0], max_kl=1e-4)
    assert loss_PT.max() <= 1e-3
    mass_P = np.exp(stored.kept_logp_E.astype(float)).reshape(-1, 8).sum(1) + np.exp(stored.tail_logsum_PT[:, 0])
    np.testing.assert_allclose(mass_P, 1, atol=mass_tolerance(1e-4))


def test_equally_probable_ids_among_certain_ones_still_add_up_to_one():
    """All are rounded the same way, which their KL does not see."""
    certain = teacher(4000, 8, 0, 30.0)
    even = replace(teacher(20, 8, 1, 1.0), kept_logp_E=np.full(160, -np.log(2000), np.float32))
    even.tail_logsum_PT[:] = np.log(1992 / 2000)
    many = Positions.concatenate([certain] + [even] * 3)
    many = replace(many, kept_logp_E=many.kept_logp_E.copy())
    many.kept_logp_E[-480:] = np.log(1 / 8.5)
    many.tail_logsum_PT[-60:] = np.log(0.5 / 8.5)
    for offset in np.linspace(0, 0.4, 9):  # wherever the levels happen to lie
        moved = replace(many, kept_logp_E=many.kept_logp_E.copy())
        moved.kept_logp_E[-480:] -= np.float32(offset)
        stored, _ = round_positions(moved, [1.0], max_kl=1e-4)
        sums = [np.exp(x.kept_logp_E.astype(float)).reshape(-1, 8).sum(1) for x in (moved, stored)]
        assert np.abs(sums[0] - sums[1]).max() <= mass_tolerance(1e-4)


def test_a_cold_temperature_is_measured_where_its_powers_underflow():
    """At T = 0.05 p^(1/T) of a flat teacher is below what fp32 holds, and so is what is left of an empty tail."""
    exact = teacher(50, 40, 0, 0.2)
    cold = np.log(np.exp(exact.kept_logp_E.reshape(50, 40).astype(float)[:, -1:] * 20)).astype(np.float32)
    exact = replace(exact, tail_logsum_PT=np.concatenate([exact.tail_logsum_PT[:, :1], cold], axis=1))
    for tail in (exact.tail_logsum_PT, np.full_like(exact.tail_logsum_PT, -np.inf)):
        _, loss_PT = round_positions(replace(exact, tail_logsum_PT=tail), [1.0, 0.05], max_kl=1e-4)
        assert np.isfinite(loss_PT).all()
    stored, loss_PT = round_positions(exact, [1.0, 0.05], max_kl=1e-4)
    expected = shifted_kl(exact, stored, 0.05, 1)
    np.testing.assert_allclose(loss_PT[:, 1], expected, rtol=1e-2, atol=1e-5)
    assert loss_PT[:, 1].mean() > 1e-3


def shifted_kl(exact: Positions, stored: Positions, temperature: float, column: int) -> list[float]:
    """KL by definition, in logarithms throughout."""
    losses = []
    each = [positions.split([1] * positions.num_positions) for positions in (exact, stored)]
    for one, other in zip(*each, strict=True):
        both = [np.append(x.kept_logp_E.astype(float) / temperature, x.tail_logsum_PT[0, column]) for x in (one, other)]
        p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in both)
        losses.append(float((np.exp(p) * (p - q)).sum()))
    return losses
