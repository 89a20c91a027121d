"""The manifest: what a dataset is and holds.  It is written last; a folder without one is no dataset."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from shared import __version__
from shared.config import Settings
from shared.errors import ConfigError, DamagedManifestError, UnknownVersionError, UnsealedDatasetError
from shared.files import write_atomically
from shared.schema import RowFormat

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CREATED_BY = f"logitferry {__version__}"
MAX_MANIFEST_BYTES = 256 << 20
MAX_SHARD_BYTES = (1 << 31) - 1
SHARD_PATH = r"^data/part-[0-9]{5,9}\.parquet$"
SHA256 = r"^[0-9a-f]{64}$"
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 100.0  # with at most three decimals, so that each names a column


class Shard(Settings):
    """One Parquet file and the sums over it that `info` needs without opening it."""

    path: str = Field(pattern=SHARD_PATH)
    sha256: str = Field(pattern=SHA256)
    size_bytes: int = Field(ge=0, le=MAX_SHARD_BYTES)
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    longest_row: int = Field(ge=0)
    """Tokens of the longest row, so that a student knows before it starts whether its context is long enough."""
    positions: int = Field(ge=0)
    kept: int = Field(ge=0)
    """Kept entries of all positions."""
    kept_mass: float
    """Σ over positions of the kept probability at T = 1."""
    teacher_bytes: int = Field(ge=0)
    """Compressed column chunks of all that the teacher said."""
    loss_nats: list[Annotated[float, Field(ge=0)]]
    """What storage lost at each declared temperature, Σ over positions; see `shared.rounding.storage_loss`."""


class Teacher(Settings):
    """What makes the very model recognisable: Hub commit, or digests of its config and weights."""

    name: str
    architecture: str
    dtype: str
    vocab_size: int
    revision: str | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None


class InputFile(Settings):
    name: str
    sha256: str


class Input(Settings):
    """The text files with their digests, how they were read, and what became of their records."""

    files: list[InputFile]
    settings: dict[str, Any]
    tally: dict[str, int]


def losses_line(tally: dict[str, int]) -> str:
    """For people: the counts of a tally that are about what went wrong, or nothing where nothing did."""
    quiet = ("records", "rows", "tokens", "positions")
    return "".join(
        f"; {name.replace('_', ' ')}: {count:,}" for name, count in tally.items() if count and name not in quiet
    )


class Event(Settings):
    """Something that was done to a sealed dataset, or to several of them, and made this one."""

    operation: Literal["merge", "filter", "repair"]
    created_by: str = CREATED_BY
    parents: list[Annotated[str, Field(pattern=SHA256)]]
    """Identities of the datasets that it was done to."""
    removed_rows: int = Field(default=0, ge=0)
    removed_sources: list[str] = []
    removed_shards: list[str] = []
    reason: str | None = None


class Manifest(Settings):
    """All there is to know of a dataset before a shard is opened."""

    format_version: int
    created_by: str = CREATED_BY
    teacher: Teacher
    vocab_size: int = Field(ge=1, le=1 << 24)
    """V: every id is below it."""
    tokenizer_fingerprint: str
    chat_template_sha256: str | None
    keep: dict[str, Any]
    """`method`, and the settings it had."""
    temperatures: list[float] = Field(min_length=1)
    inputs: list[Input]
    """One, or one for each dataset that was merged."""
    unit_records: int | None = Field(ge=1)
    """Records of a unit, whose number is its shard's; null where shards are no longer units."""
    shards: list[Shard]
    missing: list[Annotated[str, Field(pattern=SHARD_PATH)]]
    """Shards that were damaged and taken out; running the dump again makes them again."""
    history: list[Event]
    files: dict[str, Annotated[str, Field(pattern=SHA256)]]
    """sha256 of every other file of the dataset (card, tokenizer), by its path."""

    @field_validator("keep")
    @classmethod
    def _known_method(cls, keep: dict[str, Any]) -> dict[str, Any]:
        if keep.get("method") not in ("topk", "threshold"):
            raise ValueError(f"method is topk or threshold, got {keep.get('method')!r}")
        return keep

    @field_validator("temperatures")
    @classmethod
    def _one_first(cls, temperatures: list[float]) -> list[float]:
        if (
            temperatures[0] != 1.0
            or len(set(temperatures)) < len(temperatures)
            or not all(map(is_temperature, temperatures))
        ):
            raise ValueError(f"temperatures are 1 and then others, each once, got {temperatures}")
        return temperatures

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if any(len(shard.loss_nats) != len(self.temperatures) for shard in self.shards):
            raise ValueError("loss_nats has one number for each declared temperature")
        paths = [shard.path for shard in self.shards] + self.missing
        if len(set(paths)) < len(paths):
            raise ValueError("a shard is named twice")
        if self.keep["method"] == "threshold" and self.temperatures != [1.0]:
            raise ValueError("sampled weights are of temperature 1 alone")
        return self

    @property
    def row_format(self) -> RowFormat:
        return row_format(self.keep, self.temperatures, self.vocab_size)

    def total(self, name: str) -> Any:
        """Sum of one field over the shards."""
        return sum(getattr(shard, name) for shard in self.shards)


def row_format(keep: dict[str, Any], temperatures: Sequence[float], vocab_size: int) -> RowFormat:
    """Which columns the shards of a dataset have."""
    return RowFormat(vocab_size=vocab_size, temperatures=tuple(temperatures), has_tails=keep["method"] == "topk")


def is_temperature(temperature: float) -> bool:
    """Can it be declared?"""
    return MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE and round(temperature, 3) == temperature


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomically(folder / MANIFEST_NAME, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a sealed dataset.

    Raises:
        ConfigError: there is no such folder.
        UnsealedDatasetError: the folder has none.
        UnknownVersionError: it is of a format version that this release does not read.
        DamagedManifestError: it is not a manifest.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ConfigError(
            f"dataset {folder} " + ("is a file, not a folder" if folder.exists() else "does not exist"),
            next_step="check the path; a dataset is the folder that holds manifest.json",
        )
    if not path.is_file():
        raise UnsealedDatasetError(
            f"{folder} is no sealed dataset: it has no manifest.json",
            next_step="finish the dump: run the same `teacher-dump run` again",
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise DamagedManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        tree = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DamagedManifestError(f"{path}: not valid JSON: {error}") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise UnknownVersionError(
            f"{path}: format version {version!r}, this release reads version {FORMAT_VERSION}",
            next_step="pip install --upgrade logitferry",
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedManifestError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']} ({error.error_count()} faults in all)"
        ) from None
