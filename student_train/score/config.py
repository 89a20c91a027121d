"""The config of `student-train score`."""

from pydantic import Field, model_validator

from shared.config import LocalPath, Settings
from student_train.config import StudentSettings
from student_train.data_config import DataSettings


class ScoreSettings(Settings):
    student: StudentSettings
    data: DataSettings
    """Rows to score, of a manner where one is named; what a teacher said of their labels is written down as well."""
    output: LocalPath
    """Folder for scores.jsonl and score.json."""
    rollouts: str | None = None
    """Output folder of `student-train rollout` on the same rows with verify, or a glob of such records: how often each
    row was answered right."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward pass."""
    packing: bool = True
    """Put rows one behind the other, instead of side by side with padding; changes speed, not the scores."""
    device: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> "ScoreSettings":
        if self.student.lora is not None:
            raise ValueError("student.lora is for training: a run's model has its adapters merged")
        if self.student.compile:
            raise ValueError("student.compile is for training")
        if self.data.has_curriculum:
            raise ValueError("a curriculum is for rows that are trained on: score all of them")
        return self
