"""Replies are marked by the answer in them, or by a function of the user's, whose mistakes are told as such."""

from pathlib import Path

import pytest

from shared.errors import ConfigError, LogitferryError
from student_train.rollout.config import VerifySettings
from student_train.rollout.verifier import Verifier, verifier_of

FUNCTIONS = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Seen:  # which looks its module up
    what: str

def contains(reply, reference, prompt):
    return reference in Seen(reply).what and "?" in prompt

def fails(reply, reference, prompt):
    return 1 / 0

def counts(reply, reference, prompt):
    return len(reply)

NUMBER = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "marks.py").write_text(FUNCTIONS)
    return tmp_path / "marks.py"


def by_function(file: Path, name: str) -> Verifier:
    return verifier_of(VerifySettings(function=f"{file}:{name}"))


def is_right(verifier: Verifier, reply: str, reference: str = "#### 5") -> bool:
    return verifier.is_right("row-3", reply=reply, reference=reference, prompt="How many?")


def test_an_answer_is_compared_as_an_evaluation_does():
    verifier = verifier_of(VerifySettings(answer=r"#### (\S+)"))
    assert is_right(verifier, "So #### 4 or #### $5.00")
    assert not is_right(verifier, "#### 5 or #### 4")
    assert not is_right(verifier, "five")
    assert verifier.has_answer("#### 1")
    assert not verifier.has_answer("one")


def test_a_function_is_asked_with_reply_reference_and_prompt(file):
    verifier = by_function(file, "contains")
    assert is_right(verifier, "It is #### 5.")
    assert not is_right(verifier, "It is 5.")
    assert verifier.has_answer("")


def test_another_file_is_another_verifier(file):
    before = by_function(file, "contains").identity()
    assert before["function"] == "contains"
    file.write_text(FUNCTIONS + "# changed")
    assert by_function(file, "contains").identity() != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"marks\.py:fails raised ZeroDivisionError: division by zero, for prompt 'row-3'"),
        ("counts", r"marks\.py:counts gave 2, for prompt 'row-3': expected True or False"),
    ],
)
def test_a_function_that_does_not_mark_is_told_with_the_prompt(file, name, message):
    with pytest.raises(LogitferryError, match=message):
        is_right(by_function(file, name), "It")


def test_a_function_that_cannot_be_had_is_told_before_anything_is_written(file, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*gone\.py"):
        by_function(tmp_path / "gone.py", "contains")
    with pytest.raises(ConfigError, match="has no function 'contain'; there are: Seen, contains, counts, fails"):
        by_function(file, "contain")
    with pytest.raises(ConfigError, match="has no function 'NUMBER'"):
        by_function(file, "NUMBER")
    file.write_text("import no_such_module")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        by_function(file, "contains")


@pytest.mark.parametrize(
    "text", ["raise SystemExit(0)\ndef leaves(*_): ...", "def leaves(*_):\n    raise SystemExit(0)"]
)
def test_a_function_that_would_end_the_process_is_a_mistake_like_any_other(text, tmp_path):
    (tmp_path / "leaves.py").write_text(text)
    with pytest.raises(LogitferryError, match="SystemExit"):
        is_right(by_function(tmp_path / "leaves.py", "leaves"), "a")
