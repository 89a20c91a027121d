"""The manifest: what a dataset is and holds.  It is written last; a folder without one is no dataset."""

import json
import math
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from shared import __version__
from shared.config import Settings
from shared.errors import ConfigError, DamagedManifestError, UnknownVersionError, UnsealedDatasetError
from shared.files import lies_within, nearest_folder, write_atomically
from shared.schema import RowFormat

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CREATED_BY = f"logitferry {__version__}"
UNSCORABLE_NAME = "unscorable.jsonl"
"""A line for each row that the teacher could not score: `unit`, `sample_id`, `source`, `reason`."""
MAX_MANIFEST_BYTES = 256 << 20
MAX_MANIFEST_VALUES = 1 << 22
"""Numbers, strings, lists and so on: those of 300,000 shards, and a GiB of memory at most."""
MAX_SETTINGS_DEPTH = 16
MAX_SHARD_BYTES = (1 << 31) - 1
MAX_SHARD_ROWS = 1 << 24
MAX_TEMPERATURES = 64
SHARD_PATH = r"^data/part-[0-9]{5,9}\.parquet$"
SHA256 = r"^[0-9a-f]{64}$"
FILE_PATH = r"^([^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*/)*[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
"""No part of it begins with a dot, so that none leads out of the folder."""
COPY_AGAIN = "copy manifest.json again from where the dataset came from"
UNSEALED = "{} is no sealed dataset: it has no manifest.json"
FINISH = "finish the dump: run the same `teacher-dump run` again"
WORK_FOLDER = ".logitferry"
"""Of a dump that is not sealed yet."""
NO_DUMP = "check the path: there is no unfinished dump either; or run again what was to write the dataset"
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 100.0  # with at most three decimals, so that each names a column


def _plain(tree: Any, depth: int = 0) -> Any:
    """Settings as they are, if JSON can hold them; raises ValueError."""
    if depth > MAX_SETTINGS_DEPTH:
        raise ValueError(f"nested deeper than {MAX_SETTINGS_DEPTH}")
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError(f"holds {tree}, which is no number")
    for each in [*tree, *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _plain(each, depth + 1)
    return tree


Count = Annotated[int, Field(ge=0, le=1 << 48)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PlainSettings = Annotated[dict[str, Any], AfterValidator(_plain)]


class Shard(Settings):
    """One Parquet file and the sums over it that `info` needs without opening it."""

    path: str = Field(pattern=SHARD_PATH)
    sha256: str = Field(pattern=SHA256)
    size_bytes: int = Field(ge=0, le=MAX_SHARD_BYTES)
    rows: int = Field(ge=1, le=MAX_SHARD_ROWS)
    tokens: Count
    longest_row: Count
    """Tokens of the longest row, so that a student knows before it starts whether its context is long enough."""
    positions: Count
    kept: Count
    """Kept entries of all positions."""
    kept_mass: Amount
    """Σ over positions of the kept probability at T = 1."""
    teacher_bytes: Count
    """Compressed column chunks of all that the teacher said."""
    loss_nats: list[Amount]
    """What storage lost at each declared temperature, Σ over positions; see `shared.rounding.storage_loss`."""


class Teacher(Settings):
    """What makes the very model recognisable: Hub commit, or digests of its config and weights."""

    name: str
    architecture: str
    dtype: str
    vocab_size: int
    engine: str | None = None
    """What ran it, by name and version."""
    engine_settings: PlainSettings = {}
    """Settings of it on which values may depend, such as a quantization."""
    revision: str | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None


class InputFile(Settings):
    name: str
    sha256: str


class Input(Settings):
    """The text files with their digests, how they were read, and what became of their records."""

    files: list[InputFile]
    settings: PlainSettings
    tally: dict[str, Count]


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
    removed_rows: Count = 0
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
    keep: PlainSettings
    """`method`, and the settings it had."""
    temperatures: list[float] = Field(min_length=1, max_length=MAX_TEMPERATURES)
    inputs: list[Input]
    """One, or one for each dataset that was merged."""
    unit_records: int | None = Field(ge=1)
    """Records of a unit, whose number is its shard's; null where shards are no longer units."""
    shards: list[Shard]
    missing: list[Annotated[str, Field(pattern=SHARD_PATH)]]
    """Shards that were damaged and taken out; running the dump again makes them again."""
    history: list[Event]
    files: dict[Annotated[str, Field(pattern=FILE_PATH, max_length=255)], Annotated[str, Field(pattern=SHA256)]]
    """sha256 of every other file of the dataset (card, tokenizer), by its path."""

    @field_validator("keep")
    @classmethod
    def _known_method(cls, keep: dict[str, Any]) -> dict[str, Any]:
        if keep.get("method") not in ("topk", "threshold"):
            raise ValueError(f"method is topk or threshold, got {keep.get('method')!r}")
        for name, needed in (("tau", keep["method"] == "threshold"), ("max_kl", False)):
            value: Any = keep.get(name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = is_number and (0 < value < 1 or (name == "max_kl" and value == 0))
            if (needed or name in keep) and not fits:
                raise ValueError(f"{name} is a number between 0 and 1, got {value!r:.40}")
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
        if any(path.startswith("data/") or path == MANIFEST_NAME for path in self.files):
            raise ValueError("files names a shard or the manifest")
        if self.keep["method"] == "threshold" and self.temperatures != [1.0]:
            raise ValueError("sampled weights are of temperature 1 alone")
        return self

    @property
    def row_format(self) -> RowFormat:
        return row_format(self.keep, self.temperatures, self.vocab_size)

    @property
    def is_imported(self) -> bool:
        """Whether it was made of another toolkit's lists, which know neither tail nor entropy."""
        return "tail" in self.keep

    @property
    def tail_is_unknown(self) -> bool:
        """Whether its lists were imported after what they left out had been normalised away."""
        return self.keep.get("tail") == "unknown"

    @property
    def loss_nats(self) -> list[float]:
        """Mean over all positions of what storage lost, for each declared temperature."""
        positions = max(self.total("positions"), 1)
        return [sum(of_T) / positions for of_T in zip(*(shard.loss_nats for shard in self.shards), strict=True)]

    def total(self, name: str) -> Any:
        """Sum of one field over the shards."""
        return sum(getattr(shard, name) for shard in self.shards)


def row_format(keep: dict[str, Any], temperatures: Sequence[float], vocab_size: int) -> RowFormat:
    """Which columns the shards of a dataset have."""
    return RowFormat(vocab_size=vocab_size, temperatures=tuple(temperatures), has_tails=keep["method"] == "topk")


def is_temperature(temperature: float) -> bool:
    """Can it be declared?"""
    return MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE and round(temperature, 3) == temperature


def manifest_bytes(manifest: Manifest) -> bytes:
    """What stands in the file."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False).encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST_NAME, manifest_bytes(manifest))


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
            next_step=nearest_folder(folder) or "check the path; a dataset is the folder that holds manifest.json",
        )
    try:
        data = _bytes_of(path)
    except FileNotFoundError:
        step = FINISH if (folder / WORK_FOLDER).is_dir() else NO_DUMP
        raise UnsealedDatasetError(UNSEALED.format(folder), next_step=step) from None
    except OSError as error:
        raise DamagedManifestError(f"{path}: cannot be read: {error.strerror or error}", next_step=COPY_AGAIN) from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """The manifest that these bytes are; `path` is for messages.

    Raises:
        UnknownVersionError, DamagedManifestError: see `read_manifest`.
    """
    try:
        tree = _parse(data)
    except (ValueError, RecursionError) as error:
        raise DamagedManifestError(f"{path}: not valid JSON: {error}", next_step=COPY_AGAIN) from None
    if not isinstance(tree, dict):
        raise DamagedManifestError(f"{path}: expected a mapping, got {type(tree).__name__}", next_step=COPY_AGAIN)
    version = tree.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnknownVersionError(
            f"{path}: format version {version!r:.40}, this release reads version {FORMAT_VERSION}",
            next_step="pip install --upgrade logitferry",
        )
    try:
        return Manifest.model_validate(tree, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        got = "" if isinstance(first["input"], dict | list) else f", got {first['input']!r:.60}"
        place = ".".join(map(str, first["loc"])) or "the whole of it"
        raise DamagedManifestError(
            f"{path}: {place[:200]}: {first['msg']}{got} ({error.error_count()} faults in all)",
            next_step=COPY_AGAIN,
        ) from None


def _bytes_of(path: Path) -> bytes:
    """The bytes of a manifest; raises OSError, also where there are too many of them."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a file")
    if not lies_within(path.parent, path):
        raise OSError("it is a link that leads outside the dataset")
    if status.st_size > MAX_MANIFEST_BYTES:
        raise OSError(f"{status.st_size} bytes, at most {MAX_MANIFEST_BYTES} are allowed")
    return path.read_bytes()


def _parse(data: bytes) -> Any:
    """The tree of a JSON text; raises ValueError or RecursionError."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"{len(data)} bytes, at most {MAX_MANIFEST_BYTES} are allowed")
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > MAX_MANIFEST_VALUES:
        raise ValueError(f"{values} values, at most {MAX_MANIFEST_VALUES} are allowed")
    tree = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    if b"\\u" in data:
        json.dumps(tree, ensure_ascii=False).encode()  # raises where it is half a character
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name!r:.60} is given twice")
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
