"""The worst rows: what is coloured, what is told of each token, and what is left out of long ones."""

import re

from student_train.evaluation import Evaluation
from student_train.report.evals import Look
from student_train.report.samples import MAX_TOKENS, Samples, worst_stretch
from tests.student_train.report.made import evaluation, worst_row


def look(*rows) -> Look:
    return Look(name="kd", evaluation=Evaluation.model_validate(evaluation(list(rows))))


def spans_of(html: str) -> list[tuple[str, str]]:
    return re.findall(r'<span class="([^"]*)"(?: id="[^"]*")?>(.*?)</span>', html, re.DOTALL)


def test_samples_colour_supervised_tokens_by_both_measures():
    looked = look(worst_row(["a ", "b ", "c ", "d ", "e "], [0.01, 0.02, 0.6, 9.0], [5.0, 0.05, 0.2, 3.0]))
    samples = Samples.of([looked])
    html = samples.section(looked)
    assert spans_of(html) == [("k0 h4", "b "), ("k1 h0", "c "), ("k3 h1", "d "), ("k4 h3", "e ")]
    assert '<div class="text" dir="auto">a <span' in html
    (told,) = samples.data()["rows"]
    assert told["supervised"] == [1, 2, 3, 4]
    assert (told["kl"], told["ce"]) == ([0.01, 0.02, 0.6, 9.0], [5.0, 0.05, 0.2, 3.0])
    assert samples.data()["names"] == [" fox", " dog"]
    assert (told["teacher"], told["student"]["name"]) == ({"name": [0] * 4, "p": [0.5] * 4}, [1] * 4)
    # Listed with the worst first, each with a link to where it stands.
    assert re.findall('<a href="#r0t([0-9])"', html) == ["4", "3", "2", "1"]
    assert all(f'id="r0t{t}"' in html for t in (1, 2, 3, 4))


def test_samples_without_a_teacher_are_coloured_by_their_cross_entropy():
    looked = look(worst_row(["a", "b"], None, [5.0]))
    samples = Samples.of([looked])
    html = samples.section(looked)
    assert spans_of(html) == [("k4 h4", "b")]
    assert "KL" not in html
    told = samples.data()["rows"][0]
    assert told["kl"] is told["realised"] is told["teacher"] is None


def test_samples_mark_line_feeds_and_tokens_that_show_nothing():
    looked = look(worst_row(["x", "", "é", "\n"], [0.0] * 3, [0.0] * 3))
    assert spans_of(Samples.of([looked]).section(looked)) == [("k0 h0 e", ""), ("k0 h0", "é"), ("k0 h0", "<b></b>\n")]


def test_samples_of_long_rows_show_the_stretch_that_is_worst():
    tokens, kl = [f"{n} " for n in range(9_000)], [0.0] * 8_999
    kl[6_000:6_005] = [50.0] * 5
    rows = [worst_row(tokens, kl, [0.1] * 8_999, f"row-{n}") for n in range(20)]
    looked = look(*rows)
    samples = Samples.of([looked])
    html = samples.section(looked)
    assert len(spans_of(html)) <= MAX_TOKENS
    begin, end = worst_stretch(looked.evaluation.worst[0], samples.budget)
    assert begin <= 6_001
    assert end >= 6_006
    assert end - begin == MAX_TOKENS // 20
    assert f"<i>… {begin:,} tokens …</i>" in html
    assert f"<i>… {9_000 - end:,} tokens …</i>" in html
    assert "15 more rows" in html
