"""Curves of long runs: small, and no spike is lost."""

import math

import numpy as np
import pytest

from student_train.report.axes import fitted, spoken, tick_label
from student_train.report.read import read_stage
from student_train.report.series import BUCKETS, Buckets
from tests.student_train.report.made import log_lines, made_run, step_line


def test_series_keep_a_spike_of_one_step(tmp_path):
    lines = [{"step": step, "loss": 1.0, "ce": 2.0} for step in range(1, 5_002)]
    lines[3_210]["ce"] = 77.0
    buckets = Buckets.of([read_stage(made_run(tmp_path / "long", lines), "long")])
    curve = buckets.curve("ce")
    assert buckets.count == BUCKETS
    assert not buckets.are_steps
    (spike,) = np.flatnonzero(curve.high_B > 2)
    first_B, last_B = buckets.steps()
    assert first_B[spike] <= 3_211 <= last_B[spike]
    assert (curve.high_B[spike], curve.low_B[spike]) == (77.0, 2.0)
    # Every step is in one bucket.
    np.testing.assert_array_equal(first_B[1:], last_B[:-1] + 1)
    assert (first_B[0], last_B[-1]) == (1, 5_001)


def test_series_leave_steps_that_went_wrong_out_of_the_curve_and_of_the_axis_alone(tmp_path):
    def bend(line):
        wrong = {"ce": 900.0, "anomaly": {"reason": "a spike", "skipped": True}}
        return line | {"ce": 2.0} | (wrong if line["step"] == 200 else {})

    curve = Buckets.of([read_stage(made_run(tmp_path / "sick", log_lines(change=bend)), "sick")], 50).curve("ce")
    assert np.nanmax(curve.high_B) == 900
    assert np.nanmax(curve.usual_high_B) == 2
    np.testing.assert_allclose(curve.smooth_B, 2)


def test_series_of_stages_lie_behind_one_another_each_with_its_share(tmp_path):
    stages = [
        read_stage(made_run(tmp_path / name, [step_line(step) for step in range(1, steps + 1)]), name)
        for name, steps in (("sft", 3000), ("blink", 1), ("kd", 1000))
    ]
    buckets = Buckets.of(stages, 40)
    assert np.bincount(buckets.stage_B).tolist() == [30, 1, 10]
    assert buckets.offsets == [0, 3000, 3001]
    places = buckets.places()
    assert (np.diff(places) > 0).all()
    assert places[30] == pytest.approx(3001 / 4001)
    # What only one stage has is nothing in the others.
    np.testing.assert_array_equal(np.isnan(buckets.curve("ce").smooth_B), False)
    assert buckets.curve("mfu").is_empty


def test_series_smooth_without_a_lag(tmp_path):
    buckets = Buckets.of([read_stage(made_run(tmp_path / "kd"), "kd")], 100)
    curve, (first_B, last_B) = buckets.curve("ce"), buckets.steps()
    exact_B = 2 - (first_B + last_B) / 2 / 400
    np.testing.assert_allclose(curve.smooth_B[:-2], exact_B[:-2], atol=0.003)


@pytest.mark.parametrize(
    ("values", "scale", "low", "high", "is_log"),
    [
        ([1.0, 2.0, math.nan], "either", 0.9, 2.1, False),
        ([0.003, 6.4], "either", 0.002, 10.0, True),
        ([-0.1, 6.4], "either", -0.5, 6.8, False),  # an estimated KL
        ([0.0, 0.5, 8.0], "log", 0.5, 8.0, True),
        ([0.0, 0.0], "log", 0.0, 1.0, False),
        ([5.0], "linear", 0.0, 5.5, False),
        ([60.0, 64.0], "from zero", 0.0, 68.0, False),
        ([math.nan], "linear", 0.0, 1.0, False),
        ([], "linear", 0.0, 1.0, False),
    ],
)
def test_axis_holds_its_values(values, scale, low, high, is_log):
    axis = fitted(np.array(values), scale=scale)
    assert axis.is_log == is_log
    assert axis.low == pytest.approx(low, rel=0.5, abs=0.01)
    assert axis.high == pytest.approx(high, rel=0.5)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in ticks)
    assert all(0 <= axis.place(value) <= 1 for value in values if value > 0)


def test_axis_of_a_scale_that_spans_too_much_ends_somewhere():
    axis = fitted(np.array([1e-300, 1e3]), scale="log")
    assert axis.low > 1e-8
    assert axis.place(1e-300) < 0


def test_axis_that_clips_leaves_a_slow_first_step_out():
    values = np.array([0.9] + [0.01, 0.02] * 500)
    assert fitted(values, scale="from zero", clips=True).high < 0.03
    assert fitted(values, scale="from zero").high > 0.9


@pytest.mark.parametrize(
    ("value", "unit", "says"),
    [
        (1.23456, "nats", "1.235"),
        (-0.00012, "nats", "−0.0001200"),
        (2e-6, "number", "2.00e−6"),
        (0.9834, "share", "98.3 %"),
        (0.99987, "share", "99.99 %"),
        (12_345.6, "rate", "12,346"),
        (3 << 30, "bytes", "3.0 GiB"),
        (math.nan, "nats", "–"),
        (None, "nats", "–"),
        (1e30, "nats", "1.000e30"),
    ],
)
def test_numbers_are_said_shortly(value, unit, says):
    assert spoken(value, unit) == says


@pytest.mark.parametrize(
    ("tick", "unit", "step", "label"),
    [(0.0, "share", 0.25, "0"), (0.125, "share", 0.025, "12.5 %"), (1e-5, "number", 5e-6, "1e−5"),
     (200_000, "rate", 50_000, "200k"), (2.5, "nats", 0.5, "2.5"), (40 << 30, "bytes", 1, "40 GiB")],
)  # fmt: skip
def test_ticks_are_labelled_shortly(tick, unit, step, label):
    assert tick_label(tick, unit, step) == label
