"""Curricula: which rows are taken, in which order filters look at them, and what is said of those that are dropped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import ConfigError, DamagedDataError, LogitferryError
from shared.rows import Row
from shared.text_rows import Tally
from student_train.asked import as_asked
from student_train.curriculum import Choice, choose
from student_train.data_config import CurriculumSettings, SourceSettings
from student_train.scores import read_scores
from student_train.sources import TextSource
from student_train.taken import scores_of
from tests.data import write_jsonl

PROMPT = [5, 6, 7]


def row(name: str, prompt: list[int], answer: list[int]) -> Row:
    marks = [False] * len(prompt) + [True] * len(answer)
    return Row(sample_id=name, input_ids_L=np.array(prompt + answer, np.int32), label_mask_L=np.array(marks, np.bool_))


def lengths(*counts: int) -> list[Row]:
    return [row(f"{n}", [5, 6, 7, n + 10], [9] * count) for n, count in enumerate(counts)]


@pytest.fixture
def chosen(tokenizer: Any):
    """What a curriculum makes of rows, two to a block, of which some may be held out."""

    def make(rows: list[Row], held_out: Any = (), **settings: Any) -> Choice:
        curriculum = CurriculumSettings.model_validate(settings)
        source = TextSource(files=["rows"], blocks=[rows[n : n + 2] for n in range(0, len(rows), 2)], tally=Tally())
        said = SourceSettings.model_construct(text=None, curriculum=curriculum)
        asked = as_asked(source, said, tokenizer.backend_tokenizer)
        is_left_R = np.array([each.sample_id not in held_out for each in rows])
        found = choose(curriculum, asked, is_left_R, scores_of(curriculum, {}))
        dropped = dict(found.dropped(source.sample_ids))
        taken = {each.sample_id for each, mark in zip(rows, found.is_taken_R, strict=True) if mark}
        assert taken.isdisjoint(dropped)
        assert taken | dropped.keys() | set(held_out) == {each.sample_id for each in rows}, "every row is accounted for"
        assert found.counts["taken"] == len(taken)
        assert sum(found.counts["dropped"].values()) == len(dropped)
        return found

    return make


def taken(found: Choice) -> list[int]:
    return np.flatnonzero(found.is_taken_R).tolist()


@pytest.mark.parametrize(
    ("quantiles", "expected"),
    [([0.2, 0.8], [2, 3, 4, 5, 6, 7]), ([0, 0.5], [0, 1, 2, 3, 4]), ([0.9, 1], [9]), ([0, 1], list(range(10)))],
)
def test_quantiles_take_the_rows_between_two_shares(chosen, quantiles: list[float], expected: list[int]):
    found = chosen(lengths(*range(1, 11)), difficulty="length", quantiles=quantiles)
    assert taken(found) == expected


def test_quantiles_are_of_what_is_trained_on_and_left_by_the_filters_before(chosen):
    rows = [*lengths(1, 2, 3, 4, 5), *(row(f"again-{n}", [5, 6, 7, 14], [9] * 5) for n in range(20))]
    found = chosen(rows, held_out={"0"}, difficulty="length", quantiles=[0.3, 0.7], deduplicate=True)
    assert taken(found) == [2, 3], "of 2, 3, 4 and 5 tokens; neither repeats nor a held-out row move the bounds"
    assert found.counts["dropped"] == {
        "with the same tokens as one before": 20,
        "easier than length 3": 1,
        "harder than length 4": 1,
    }
    assert found.line() == (
        "24 rows, 2 taken; dropped: 20 with the same tokens as one before, 1 easier than length 3, "
        "1 harder than length 4"
    )


def test_values_are_bounds_and_null_is_none(chosen):
    rows = lengths(3, 1, 4, 1, 5)
    assert taken(chosen(rows, difficulty="length", values=[3, None])) == [0, 2, 4]
    assert taken(chosen(rows, difficulty="length", values=[None, 3])) == [0, 1, 3]
    assert taken(chosen(rows, difficulty="length", values=[2, 4], quantiles=[0, 0.5])) == [0], "within both"


def test_of_rows_with_the_same_tokens_the_first_stays(chosen):
    rows = [row("a", PROMPT, [8, 9]), row("b", PROMPT, [8]), row("c", [5, 6, 7, 8], [9]), row("d", PROMPT, [8])]
    assert taken(chosen(rows, deduplicate=True)) == [0, 1]


def test_of_answers_to_one_prompt_the_shortest_stays(chosen):
    rows = [
        row("long", PROMPT, [8, 9, 9]),
        row("short", PROMPT, [8]),
        row("as short", PROMPT, [9]),
        row("other prompt", [5, 6, 8], [8, 9, 9, 9]),
    ]
    found = chosen(rows, shortest_answer=True)
    assert taken(found) == [1, 3]
    assert found.counts["dropped"] == {"of a prompt with a shorter answer": 2}


def test_texts_without_a_prompt_are_not_answers_to_one(chosen):
    """Plain text is supervised as a whole behind its first token, which is the same for all of it."""
    rows = [row(f"text-{n}", [1], [8 + n, 9]) for n in range(4)]
    assert taken(chosen(rows, shortest_answer=True)) == [0, 1, 2, 3]


def test_the_shortest_answer_is_the_shortest_that_is_right(chosen, tmp_path: Path):
    rows = [row("wrong", PROMPT, [8]), row("long", PROMPT, [8, 9, 9]), row("right", PROMPT, [8, 9])]
    rows += [row("unknown", PROMPT, [8, 8]), row("nowhere", PROMPT, [8, 7])]
    marks = {"wrong": False, "long": True, "right": True, "unknown": None}
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"sample_id": name, "ok": mark} for name, mark in marks.items()])
    found = chosen(rows, scores=str(scores), right="ok", shortest_answer=True)
    assert taken(found) == [2]
    assert found.counts["dropped"] == {
        "without a line in scores": 1,
        "not right": 1,
        "not known to be right": 1,
        "of a prompt with a shorter answer": 1,
    }


def test_difficulty_comes_from_scores_wherever_a_row_stands_in_them(chosen, tmp_path: Path):
    records = [{"id": name, "nll": value} for name, value in (("3", 0.5), ("x", 9), ("0", 3), ("2", None), ("1", 2))]
    scores = write_jsonl(tmp_path / "scores.jsonl", records)
    found = chosen(lengths(1, 1, 1, 1, 1), scores=str(scores), difficulty="nll", order="easy_to_hard")
    assert taken(found) == [0, 1, 3]
    np.testing.assert_array_equal(found.difficulty_R, [3, 2, np.nan, 0.5, np.nan])
    assert found.counts["dropped"] == {"without a line in scores": 1, "of unknown nll": 1}


def test_a_curriculum_that_leaves_nothing_says_what_took_it(chosen, tmp_path: Path):
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"sample_id": "other", "nll": 1}])
    with pytest.raises(ConfigError, match=r"the curriculum leaves no row to train on: 3 rows, 0 taken; dropped: 3"):
        chosen(lengths(1, 2, 3), scores=str(scores), difficulty="nll", order="easy_to_hard")


def test_scores_are_the_same_from_json_and_from_parquet(tmp_path: Path):
    records = [{"sample_id": n, "nll": n / 4, "ok": bool(n % 2)} for n in range(5)] + [{"sample_id": 9, "nll": None}]
    files = [str(write_jsonl(tmp_path / "scores.jsonl", records)), str(tmp_path / "scores.parquet")]
    pq.write_table(
        pa.Table.from_pylist(records, pa.schema({"sample_id": "int64", "nll": "double", "ok": "bool"})), files[1]
    )
    one, other = (read_scores(file, numbers="nll", truths="ok") for file in files)
    assert one.sample_ids.to_pylist() == other.sample_ids.to_pylist() == ["0", "1", "2", "3", "4", "9"]
    for name in ("nll", "ok"):
        np.testing.assert_array_equal(one.columns[name], other.columns[name])
    assert one.sha256 != other.sha256


BROKEN: dict[str, tuple[str, str]] = {
    "a misspelt column": (
        '{"sample_id": "a", "n_ll": 1}',
        r"has no column 'nll'; there are sample_id, n_ll\n.*mean n_ll",
    ),
    "no id": ('{"name": "a", "nll": 1}', "has no column 'sample_id'; there are name, nll"),
    "an id twice": (
        '{"id": "a", "nll": 1}\n{"id": "b", "nll": 1}\n{"id": "a", "nll": 2}',
        "1 sample ids come again, first 'a'",
    ),
    "a text for a number": (
        '{"id": "a", "nll": 1}\n{"id": "b", "nll": "2"}',
        r"jsonl:2: nll: expected a number, got '2'",
    ),
    "a truth for a number": ('{"id": "a", "nll": true}', r"jsonl:1: nll: expected a number, got True"),
    "what is no number": ('{"id": "a", "nll": NaN}', r"jsonl:1: not JSON: NaN is no JSON"),
    "an endless number": ('{"id": "a", "nll": 1e999}', r"jsonl:1: nll: expected a number, got inf"),
    "a number of many digits": ('{"id": "a", "nll": 1' + "0" * 400 + "}", r"jsonl:1: nll: expected a number"),
    "a line that is cut": ('{"id": "a", "nll": 1}\n{"id": "b", "nl', r"jsonl:2: not JSON"),
    "an id that is none": ('{"id": ["a"], "nll": 1}', r"jsonl:1: sample_id: expected a string or an integer"),
    "nothing": ("", "holds no records"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_scores_that_cannot_be_used_are_refused_with_their_place(name: str, tmp_path: Path):
    text, message = BROKEN[name]
    (tmp_path / "scores.jsonl").write_text(text)
    with pytest.raises(LogitferryError, match=message):
        read_scores(str(tmp_path / "scores.jsonl"), numbers="nll", truths=None)


def test_scores_of_parquet_are_refused_with_their_place(tmp_path: Path):
    file = str(tmp_path / "scores.parquet")
    pq.write_table(pa.table({"sample_id": ["a", "b"], "nll": [1.0, float("nan")]}), file)
    with pytest.raises(ConfigError, match=r"parquet\[1\]: nll: expected a number, got nan"):
        read_scores(file, numbers="nll", truths=None)
    with pytest.raises(ConfigError, match=r"has no column 'nl'; there are sample_id, nll\n.*did you mean nll"):
        read_scores(file, numbers="nl", truths=None)
    with pytest.raises(ConfigError, match=r"expected true or false, got 1\.0"):
        read_scores(file, numbers=None, truths="nll")
    Path(file).write_bytes(b"PAR1")
    with pytest.raises(DamagedDataError, match="not readable as Parquet"):
        read_scores(file, numbers="nll", truths=None)


def test_scores_that_are_not_there_or_are_several_are_refused(tmp_path: Path):
    (tmp_path / "scores.jsonl").write_text("{}")
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean scores\.jsonl"):
        read_scores(str(tmp_path / "score.jsonl"), numbers="nll", truths=None)
    with pytest.raises(ConfigError, match="is no single file"):
        read_scores(str(tmp_path), numbers="nll", truths=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "says nothing: leave it away"),
        ({"order": "easy_to_hard"}, "needs a difficulty"),
        ({"difficulty": "length"}, "named for nothing"),
        ({"difficulty": "nll", "order": "easy_to_hard"}, "would be a column of scores, and none are named"),
        ({"difficulty": "length", "order": "easy_to_hard", "scores": "s"}, "scores are named for nothing"),
        ({"difficulty": "length", "quantiles": [0.8, 0.2]}, "a lower and a higher bound"),
        ({"deduplicate": True, "pace": {"begin": 0.2}}, "pace is for order: competence"),
    ],
)
def test_curricula_that_say_nothing_clear_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CurriculumSettings.model_validate(settings)


def test_text_has_no_teacher_to_say_what_is_hard():
    curriculum = {"difficulty": "teacher_nll", "order": "easy_to_hard"}
    with pytest.raises(ValueError, match="difficulty: teacher_nll is of a dataset's teacher, and text has none"):
        SourceSettings.model_validate({"text": {"files": ["f"]}, "curriculum": curriculum})


def test_what_was_dropped_is_data(chosen):
    rows = [row("a", PROMPT, [8]), row("b", PROMPT, [8]), row("c", PROMPT, [9, 9, 9])]
    source = TextSource(files=[], blocks=[rows[:2], rows[2:]], tally=Tally())
    found = chosen(rows, deduplicate=True, difficulty="length", values=[None, 2])
    dropped = list(found.dropped(source.sample_ids))
    assert dropped == [("b", "with the same tokens as one before"), ("c", "harder than length 2")]
    assert json.loads(json.dumps(found.counts)) == found.counts
