"""What the report raises: each sickness is seen with its number, and a healthy run raises nothing."""

import pytest

from student_train.report.checks import findings, share_of_time
from student_train.report.read import read_stage
from tests.student_train.report.made import held_out_line, log_lines, made_run, step_line


def seen(tmp_path, lines):
    found = findings([read_stage(made_run(tmp_path / "kd", lines), "kd")])
    assert all(each.means.endswith((".", "?")) and each.seen.endswith(".") for each in found)
    return [each.seen for each in found]


def test_checks_raise_nothing_of_a_healthy_run(tmp_path):
    assert seen(tmp_path, log_lines()) == []


def falling(line, begin, end):
    return begin + (end - begin) * line["step"] / 400


SICK = {
    "wait": (lambda line: {"wait": 0.2}, "20 % of the time was spent waiting for data (above 5 %)"),
    "waste": (lambda line: {"waste": 0.3}, "30 % of the tokens computed are padding (above 10 %)"),
    "kept": (
        lambda line: {"kept_mass": 0.8, "student_kept_mass": 0.8},
        "The kept ids hold 80.0 % of the teacher's probability (below 90 %)",
    ),
    "drift": (
        lambda line: {"student_kept_mass": falling(line, 0.97, 0.77)},
        "The student holds 78.0 % where the teacher holds 98.0 %: 20.0 points less, and it was 2.0",
    ),
    "entropy": (
        lambda line: {"student_entropy": falling(line, 0.8, 0.1)},
        "The student's entropy is 0.134 nats where the teacher's is 0.700 (below 50 %)",
    ),
    "agreement": (
        lambda line: {"agreement": 0.5},
        "Agreement with the teacher stands at 50.0 % (below 70 %), +0.0 points over the second half",
    ),
    "norm": (lambda line: {"grad_norm": falling(line, 0.5, 9)}, "The gradient norm has grown to 8.59"),
    "speed": (
        lambda line: {"tokens_per_s": 5000 if line["step"] < 350 else 1000},
        "Speed fell to 20 % of the stage's median (below 70 %), 1,000 tokens per second",
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_checks_see_what_is_sick(tmp_path, name):
    change, says = SICK[name]
    (found,) = seen(tmp_path, log_lines(change=lambda line: line | change(line)))
    assert found.startswith(says)


def test_checks_do_not_take_a_beginners_gap_for_drift(tmp_path):
    lines = log_lines(change=lambda line: line | {"student_kept_mass": falling(line, 0.2, 0.85)})
    assert seen(tmp_path, lines) == []


def test_checks_say_which_rows_are_behind_steps_that_went_wrong(tmp_path):
    def bend(line):
        if line["step"] not in (120, 130, 140):
            return line
        worst = "b" if line["step"] == 120 else "a"
        rows = [{"sample_id": worst, "ce": 50.0, "kd": 2.0}, {"sample_id": "innocent"}]
        return line | {"grad_norm": 9e9, "anomaly": {"reason": "gradient norm 9e9", "skipped": True, "rows": rows}}

    (found,) = findings([read_stage(made_run(tmp_path / "kd", log_lines(change=bend)), "kd")])
    assert found.seen == "3 of 400 steps went wrong, 3 of them skipped: steps 120 to 140, first gradient norm 9e9."
    assert found.means == "Look at the rows that were worst in them: a (2 times), b."


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (
            {"ce": 2.5},
            ["Held-out cross-entropy rose to 2.500, from 1.350 at step 300 (by more than 2 %), while it falls"],
        ),
        ({"kl": 0.6}, ["Held-out KL rose to 0.6000, from 0.4000 at step 0 (by more than 2 %)."]),
        ({"ece": 0.2}, ["The calibration error on held-out rows is 0.200 (above 0.1)."]),
        ({"ce": 1.36, "kl": None}, []),
    ],
)
def test_checks_see_what_held_out_rows_say(tmp_path, last, says):
    found = seen(tmp_path, [*log_lines()[:-1], held_out_line(400, **last)])
    assert [a[: len(b)] for a, b in zip(found, says, strict=True)] == says


def test_checks_see_no_trends_in_few_steps(tmp_path):
    assert seen(tmp_path, [step_line(step) | {"wait": 0.5, "kept_mass": 0.1} for step in range(1, 50)]) == []


def test_share_of_time_counts_long_steps_more(tmp_path):
    lines = [step_line(1) | {"wait": 0.9, "elapsed_s": 1.0}, step_line(2) | {"wait": 0.1, "elapsed_s": 4.0}]
    stage = read_stage(made_run(tmp_path / "kd", [*lines, step_line(3) | {"wait": None}]), "kd")
    assert share_of_time(stage, "wait") == pytest.approx((0.9 * 1 + 0.1 * 3) / 4)
