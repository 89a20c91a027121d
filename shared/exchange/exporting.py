"""A dataset of ours, verified as it is read, as others read it; one file, there when it is whole.

Memory: one row group.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shared.dataset import LogitDataset
from shared.errors import ConfigError, MismatchError
from shared.exchange import axolotl
from shared.files import written_atomically
from shared.rows import LogitRow
from shared.schema import RowFormat

Form = Literal["axolotl", "jsonl"]
SUFFIXES = {"axolotl": (".parquet", ".jsonl", ".jsonl.zst"), "jsonl": (".jsonl", ".jsonl.zst")}


class _Sink(Protocol):
    def write(self, rows: list[LogitRow]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is written."""

    form: Form
    offset: int = axolotl.TRAINER_OFFSET
    """Of axolotl's lists: the one at index i is about token i + offset."""
    renormalised: bool = False
    """Axolotl's lists add up to one."""


def export_dataset(
    dataset: LogitDataset, output: Path, settings: ExportSettings, on_shard: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write it and say what was written.

    Raises:
        ConfigError: the output is there already, or its name has another ending.
        MismatchError: the dataset holds what this form cannot say.
        DamagedShardError: a shard is not what was written; the output is not there then.
    """
    manifest = dataset.manifest
    if not output.name.endswith(SUFFIXES[settings.form]):
        raise ConfigError(
            f"output {output}: {settings.form} is written to {', '.join(SUFFIXES[settings.form])}",
            next_step="give --output one of these endings",
        )
    if output.exists():
        raise ConfigError(f"output {output} exists", next_step="give another --output, or remove it")
    if settings.form == "axolotl" and not manifest.row_format.has_tails:
        raise MismatchError(
            f"{dataset.name} was kept by {manifest.keep['method']}: its lists are samples with weights, "
            "which axolotl would take for log-probabilities",
            next_step="export --to jsonl, or dump with keep.method: topk",
        )
    if missing := manifest.missing:
        raise MismatchError(
            f"{dataset.name}: {len(missing)} shards are missing",
            next_step="run its dump again, which makes them, then export",
        )
    rows = positions = 0
    with written_atomically(output) as file, _sink(file, output, settings, manifest.row_format) as sink:
        for index in range(len(manifest.shards)):
            for group in dataset.row_groups(index):
                sink.write(group)
                rows, positions = rows + len(group), positions + sum(row.num_positions for row in group)
            on_shard()
    return {
        "output": str(output),
        "format": settings.form,
        "rows": rows,
        "positions": positions,
        "size_bytes": output.stat().st_size,
        "identity": dataset.identity(),
        **({"offset": settings.offset, "renormalised": settings.renormalised} if settings.form == "axolotl" else {}),
    }


@contextmanager
def _sink(file: BinaryIO, output: Path, settings: ExportSettings, row_format: RowFormat) -> Iterator[_Sink]:
    if output.suffix == ".parquet":
        with pq.ParquetWriter(file, axolotl.schema(), compression="zstd", write_page_checksum=True) as writer:
            yield _ParquetSink(writer, settings)
    elif output.suffix == ".zst":
        with zstandard.ZstdCompressor(level=5).stream_writer(file, closefd=False) as compressed:
            yield _LinesSink(compressed, settings, row_format)
    else:
        yield _LinesSink(file, settings, row_format)


class _ParquetSink:
    def __init__(self, writer: pq.ParquetWriter, settings: ExportSettings) -> None:
        self._writer, self._settings = writer, settings

    def write(self, rows: list[LogitRow]) -> None:
        self._writer.write_table(_axolotl(rows, self._settings))


class _LinesSink:
    def __init__(self, file: Any, settings: ExportSettings, row_format: RowFormat) -> None:
        self._file, self._settings, self._row_format = file, settings, row_format

    def write(self, rows: list[LogitRow]) -> None:
        if self._settings.form == "axolotl":
            objects = _axolotl_objects(rows, self._settings)
        else:
            objects = (plain(row, self._row_format) for row in rows)
        for each in objects:
            self._file.write(json.dumps(each, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _axolotl(rows: list[LogitRow], settings: ExportSettings) -> pa.Table:
    return axolotl.table(rows, offset=settings.offset, renormalised=settings.renormalised)


def _axolotl_objects(rows: list[LogitRow], settings: ExportSettings) -> Iterator[dict[str, Any]]:
    for row in rows:
        table = _axolotl([row], settings)
        column: Any = table["target_logprobs"].combine_chunks()
        inner = pa.ListArray.from_arrays(column.values.offsets, pa.array(printed(column.values.values.to_numpy())))
        lists = pa.ListArray.from_arrays(column.offsets, inner)
        yield table.set_column(table.schema.get_field_index("target_logprobs"), "target_logprobs", lists).to_pylist()[0]


def plain(row: LogitRow, row_format: RowFormat) -> dict[str, Any]:
    """A row under the names of `FORMAT.md`'s columns; a tail of −inf is null."""
    teacher = row.teacher
    ends = np.cumsum(teacher.kept_counts_P)[:-1]

    def lists(values: Any) -> list[list[Any]]:
        return [part.tolist() for part in np.split(values, ends)]

    tails = {
        name: [None if value == -np.inf else value for value in printed(teacher.tail_logsum_PT[:, j]).tolist()]
        for j, name in enumerate(row_format.tail_columns)
    }
    return {
        "sample_id": row.sample_id,
        "source": row.source,
        "input_ids": row.input_ids_L.tolist(),
        "label_mask": row.label_mask_L.tolist(),
        "kept_ids": lists(teacher.kept_ids_E),
        "kept_logprobs": lists(printed(teacher.kept_logp_E)),
        "realised_logprob": printed(teacher.realised_logp_P).tolist(),
        "entropy": printed(teacher.entropy_P).tolist(),
        **tails,
    }


def printed(values: Any) -> Any:
    """fp64 that prints as the shortest number which is read back as the same fp32."""
    distinct, index = np.unique(values, return_inverse=True)  # few, where a dataset is rounded
    return distinct.astype("U16").astype(np.float64)[index]
