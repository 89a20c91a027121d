"""What a look at rows found, as plain data: written by the trainer and `eval`, read by `report`, which needs no torch.

Shapes: P positions (supervised tokens) of a row.  Everything is at temperature 1; nats and probabilities.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError, DamagedDataError
from shared.files import write_atomically

VERSION = 1


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="null")


class Means(_Plain):
    """Over supervised tokens.  What asks for a teacher is None where some of the rows have none.

    Ties count as right: two logits may be equal in bfloat16.
    """

    positions: int
    ce: float
    """Cross-entropy of the labels."""
    accuracy: float
    """Share of labels that the student holds for the most probable token."""
    ece: float
    """Expected calibration error over 15 bins of equal width (Guo et al., arXiv 1706.04599), of that most probable
    token as a prediction of the label."""
    student_entropy: float
    kl: float | None
    """Forward KL over kept ids and tail; estimated from a sample of ids it may lie below 0."""
    agreement: float | None
    """Share of positions where the teacher's most probable kept id is the student's most probable token."""
    kept_mass: float | None
    """Of the teacher, on the kept ids; None where they are a sample."""
    student_kept_mass: float | None
    """Of the student, on the same ids."""
    teacher_entropy: float | None


class Bin(_Plain):
    """Positions whose most probable token has a probability within one bin."""

    count: int
    confidence: float
    """Mean probability of the most probable token; 0 where there is none."""
    accuracy: float


class Histogram(_Plain):
    """How many positions have a value in [edges[i], edges[i + 1]); the last bin holds its upper edge as well."""

    edges: list[float]
    counts: list[int]


class Row(_Plain):
    """One row in full; texts are as they are, control characters included."""

    sample_id: str
    source: str
    """The dataset or text that it is from."""
    ce: float
    """Mean over its positions; so is `kl`."""
    kl: float | None
    tokens: list[str]
    """The row's text in as many parts as it has tokens; parts of one character are empty but for the last."""
    supervised_P: list[int]
    """Which tokens these are, by their place in `tokens`."""
    ce_P: list[float]
    kl_P: list[float] | None
    realised_P: list[float] | None
    """The teacher's probability of the label."""
    teacher_top_P: list[tuple[str, float]] | None
    """The teacher's most probable kept token, named alone, and its probability."""
    student_top_P: list[tuple[str, float]]
    """The student's most probable token, likewise."""


class Evaluation(_Plain):
    """Of some rows by one student."""

    version: int = VERSION
    student: str
    step: int | None = None
    """Of the run, where it was a part of one."""
    rows: int
    means: Means
    calibration: list[Bin]
    kept_mass: Histogram | None
    """Of the teacher, over positions; None where there is none, or the kept ids are a sample."""
    worst: list[Row]
    """The rows of highest mean KL, or of highest mean cross-entropy where there is no teacher; highest first."""

    def write(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=1).encode())

    @staticmethod
    def read(path: Path) -> "Evaluation":
        """What `write` wrote.

        Raises:
            ConfigError: there is no such file.
            DamagedDataError: it holds something else.
        """
        try:
            return Evaluation.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole file"
            raise DamagedDataError(f"{path} holds no evaluation: {where}: {first['msg']}") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
