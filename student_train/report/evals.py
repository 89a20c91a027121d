"""Evaluations that stand beside the runs: eval.json, as `student-train eval` writes it."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError, DamagedDataError
from student_train.evaluation import Evaluation, Row

EVAL_NAME = "eval.json"


class _Found(BaseModel):
    """Closed to values of another kind, open to keys that this release does not know."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Example(_Found):
    """A question with the answer that was expected and the one that came."""

    sample_id: str
    prompt: str = ""
    expected: str = ""
    got: str | None = None
    reply: str | None = None
    is_right: bool


class ExactMatch(_Found):
    """How often the student's own answers are right."""

    rows: int
    checkable: int
    right: int
    share: float
    standard_error: float | None = None
    examples: list[Example] = []

    def others(self) -> dict[str, float]:
        """Numbers that this release has no name for."""
        known = (self.model_extra or {}).items()
        return {name: value for name, value in known if isinstance(value, int | float) and not isinstance(value, bool)}


class Score(_Found):
    """Of one metric."""

    value: float | None = None
    stderr: float | None = None


class Task(_Found):
    """Of lm-evaluation-harness."""

    metrics: dict[str, Score] = {}
    num_fewshot: int | None = None
    documents: int | None = None


class _EvalFile(_Found):
    evaluation: Evaluation | None = None
    exact_match: ExactMatch | None = None
    lm_eval: dict[str, Task] | None = None


@dataclass(frozen=True, kw_only=True)
class Look:
    """An evaluation, of a run's held-out rows or of a file, under the name that people call it by."""

    name: str
    evaluation: Evaluation | None = None
    exact_match: ExactMatch | None = None
    lm_eval: dict[str, Task] | None = None


def read_look(path: Path) -> Look:
    """eval.json or the folder that holds it; a held_out.json goes as well.

    Raises:
        ConfigError: there is no such file.
        DamagedDataError: it holds something else.
    """
    file = path / EVAL_NAME if path.is_dir() else path
    name = str(file.parent if file.name == EVAL_NAME and file.parent.name else file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--eval {path}: {file} cannot be read: {error.strerror or error}",
            next_step="name a folder with eval.json; `student-train eval CONFIG` makes one",
        ) from None
    try:
        found: Any = _EvalFile.model_validate_json(content)
        if not {"evaluation", "exact_match", "lm_eval"} & found.model_fields_set:
            found = _EvalFile(evaluation=Evaluation.model_validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DamagedDataError(
            f"{file} is no eval.json: {where}: {first['msg']}", next_step="student-train eval CONFIG makes one"
        ) from None
    if found.evaluation is not None:
        require_whole(found.evaluation, file)
    return Look(name=name, evaluation=found.evaluation, exact_match=found.exact_match, lm_eval=found.lm_eval)


def require_whole(evaluation: Evaluation, path: Path) -> None:
    """Every row has one value of each kind for each of its supervised tokens.

    Raises:
        DamagedDataError: one has not.
    """
    for row in evaluation.worst:
        if (reason := _why_broken(row)) is not None:
            raise DamagedDataError(f"{path}: row {row.sample_id!r} {reason}", next_step="have the rows evaluated again")


def _why_broken(row: Row) -> str | None:
    places = row.supervised_P
    if any(later <= t for t, later in pairwise([-1, *places, len(row.tokens)])):
        return f"has supervised tokens that are none of its {len(row.tokens)}, in order"
    values = {name: getattr(row, name) for name in ("ce_P", "kl_P", "realised_P", "teacher_top_P", "student_top_P")}
    for name, each in values.items():
        if each is not None and len(each) != len(places):
            return f"has {len(each)} of {name} for {len(places)} supervised tokens"
    return None
