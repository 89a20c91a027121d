"""What somebody found out about rows, by sample id: .jsonl or .parquet, of `student-train score` or one's own.

Shapes: S rows of the file, R rows of a source.
"""

import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.errors import ConfigError, DamagedDataError, RecordError
from shared.raw_records import BadRecord, RawRecord, raw_records
from shared.text_files import TextFile, find_text_files

ID_NAMES = ("sample_id", "id")
Float64 = NDArray[np.float64]

logger = logging.getLogger("logitferry")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Numbers about rows; 1 and 0 for true and false, NaN where nothing is known."""

    name: str
    sha256: str
    """Of the file."""
    sample_ids: pa.StringArray = field(repr=False)
    columns: dict[str, Float64] = field(repr=False)
    """Each [S]."""

    def of(self, sample_ids: Sequence[pa.StringArray]) -> tuple[NDArray[np.bool_], dict[str, Float64]]:
        """Of rows in their order: which of them the file has [R], and each column [R]."""
        places: Any = pc.call_function(
            "index_in", [pa.chunked_array(list(sample_ids), pa.string())], pc.SetLookupOptions(self.sample_ids)
        )
        place_R = places.fill_null(-1).to_numpy()
        return place_R >= 0, {
            name: np.where(place_R >= 0, values[place_R], np.nan) for name, values in self.columns.items()
        }


def read_scores(path: str, *, numbers: str | None, truths: str | None) -> Scores:
    """The column `numbers` and the column `truths` of a file, where they are named.

    Raises:
        ConfigError: there is no such file or column, an id comes twice, or a value is of another kind.
        RecordError, DamagedDataError: the file cannot be read.
    """
    file = scores_file(path)
    wanted = {name: kind for name, kind in ((numbers, _number), (truths, _truth)) if name is not None}
    sample_ids: list[str] = []
    columns: dict[str, list[float]] = {name: [] for name in wanted}
    sha256, names = file.sha256(), dict.fromkeys(_parquet_names(file) if file.format == "parquet" else ())
    if names:
        _require_columns(path, list(names), list(wanted))
    for record in _records(file, [*ID_NAMES, *wanted]):
        names |= dict.fromkeys(record.fields)
        if not sample_ids:
            _require_columns(path, list(names), [])
        sample_ids.append(_sample_id(record))
        for name, kind in wanted.items():
            value = record.fields.get(name)
            columns[name].append(math.nan if value is None else kind(value, name, record.where))
    _require_columns(path, list(names), list(wanted))
    ids = pa.array(sample_ids, pa.string())
    _require_unique(path, ids)
    arrays = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    return Scores(name=path, sha256=sha256, sample_ids=ids, columns=arrays)


def scores_file(path: str) -> TextFile:
    """The one file that a path names.

    Raises:
        ConfigError: it names none, or several.
    """
    files = find_text_files([path])
    if len(files) != 1 or files[0].format == "datasets":
        raise ConfigError(f"scores: {path} is no single file", next_step="name one .jsonl or .parquet file")
    return files[0]


def _parquet_names(file: TextFile) -> list[str]:
    with file.open() as raw:
        try:
            return pq.read_schema(raw).names
        except (OSError, ValueError) as error:
            raise DamagedDataError(f"scores: {file.name} is not readable as Parquet: {error}") from None


def _records(file: TextFile, columns: list[str]) -> Iterator[RawRecord]:
    for record in raw_records(file, columns):
        if isinstance(record, BadRecord):
            raise record.error
        yield record


def _require_columns(path: str, names: list[str], wanted: list[str]) -> None:
    has_id = any(name in names for name in ID_NAMES)
    for name in [*wanted, *([] if has_id else ID_NAMES[:1])]:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"scores: {path} has no column {name!r}; there are {', '.join(names)}",
                next_step=f"did you mean {near[0]}?" if near else "name one of those",
            )


def _sample_id(record: RawRecord) -> str:
    value = next((record.fields[name] for name in ID_NAMES if record.fields.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RecordError(f"{record.where}: sample_id: expected a string or an integer, got {value!r}")
    return str(value)


def _number(value: Any, name: str, where: str) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ConfigError(f"{where}: {name}: expected a number, got {value!r:.80}", next_step="mend it, or leave it null")


def _truth(value: Any, name: str, where: str) -> float:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {name}: expected true or false, got {value!r:.80}")
    return float(value)


def _require_unique(path: str, sample_ids: pa.StringArray) -> None:
    num_repeats = len(sample_ids) - pc.call_function("count_distinct", [sample_ids]).as_py()
    if num_repeats:
        first = next(each["values"] for each in sample_ids.value_counts().to_pylist() if each["counts"] > 1)
        raise ConfigError(
            f"scores: {path}: {num_repeats} sample ids come again, first {first!r}",
            next_step="leave one line for each row",
        )
