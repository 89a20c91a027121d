"""The config of `student-train eval`."""

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from shared.config import LocalPath, Settings
from student_train.config import StudentSettings
from student_train.data_config import DataSettings


def one_group(pattern: str | None) -> str | None:
    """Raises ValueError unless a regular expression has one group, the answer."""
    if pattern is None:
        return None
    try:
        num_groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression: {error}") from None
    if num_groups != 1:
        raise ValueError(f"needs exactly one group, the answer, and has {num_groups}; (?:…) is not counted")
    return pattern


class GenerateSettings(Settings):
    """Exact match: the student answers by itself, always with its most probable token."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Of a reply.  Replies that reach it are counted as cut; near the end of the context there is room for fewer."""
    rows: int | None = Field(default=None, ge=1)
    """So many, drawn by `seed` and the sample ids; null takes all."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows that are generated at once; halved where memory does not suffice."""
    answer: str | None = None
    """A regular expression with one group.  Its last match is the answer, in reference and reply alike, and numbers are
    compared as such; null compares the whole text."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Tokens or strings that end a reply, besides the end-of-sequence tokens and those that end the references."""
    examples: int = Field(default=20, ge=0)
    """Wrong replies shown in full."""

    @field_validator("answer")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        return one_group(pattern)


class LmEvalSettings(Settings):
    """Tasks of lm-evaluation-harness.  A task may hold Python of its own, which is run: name only those you trust."""

    tasks: list[str] = Field(min_length=1)
    """Their names; groups, tags and wildcards go as well."""
    include_path: str | None = None
    """Folder with tasks of your own, as YAML."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; null takes what the task says."""
    limit: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """The first so many documents of each task, or below 1 the first share of them; for a try."""
    batch_size: int = Field(default=8, ge=1)
    apply_chat_template: bool = False
    """Put the tasks' prompts into the tokenizer's chat template."""


class EvalSettings(Settings):
    student: StudentSettings
    data: DataSettings | None = None
    """Rows to measure by; lm_eval alone needs none."""
    output: LocalPath
    """Folder for eval.json."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward pass that measures."""
    measure: bool = True
    """Cross-entropy, KL, agreement and calibration on the data, where there are any."""
    worst: int = Field(default=20, ge=0)
    """Rows of highest KL, or of highest cross-entropy without a teacher, shown in full."""
    generate: GenerateSettings | None = None
    lm_eval: LmEvalSettings | None = None
    device: str = "auto"
    seed: int = Field(default=0, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _consistent(self) -> "EvalSettings":
        if self.student.lora is not None:
            raise ValueError("student.lora is for training: a run's model has its adapters merged")
        if self.student.compile:
            raise ValueError("student.compile is for training: replies have another length with every token")
        if self.data is not None and self.data.has_curriculum:
            raise ValueError("a curriculum is for rows that are trained on")
        if self.data is None and self.generate is not None:
            raise ValueError("generate needs data")
        if self.data is None and self.lm_eval is None:
            raise ValueError("nothing to do: name data, lm_eval or both")
        if self.data is not None and not self.measure and self.generate is None:
            raise ValueError("data are named for nothing: set measure: true, or generate")
        if self.data is not None and self.generate is not None:
            require_whole_references(self.data, "generate")
        return self

    @property
    def measures(self) -> bool:
        """Is there something to measure?"""
        return self.measure and self.data is not None


def require_whole_references(data: DataSettings, asker: str) -> None:
    """Raises ValueError where what stands behind a prompt is not all that was answered."""
    for source in data.sources():
        if "truncate" in (source.on_too_long, source.text and source.text.on_too_long):
            raise ValueError(f"{asker} compares with whole references, and on_too_long: truncate cuts them: say drop")
        if source.text and not source.text.supervise_reasoning:
            raise ValueError(
                f"{asker} with supervise_reasoning: false would hand the reference's reasoning to the student"
            )
