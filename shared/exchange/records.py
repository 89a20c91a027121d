"""Files of other toolkits to their records: fields as Arrow arrays or Python's lists, whichever the file has."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import RecordError
from shared.raw_records import column_batches, numbered_lines
from shared.text_files import TextFile

NAMES = ("sample_id", "id", "source")


@dataclass(frozen=True, kw_only=True)
class ForeignRecord:
    """`where` is file:line or file[row]."""

    where: str
    number: int
    fields: Mapping[str, Any]

    def name(self, *fields: str) -> str | None:
        """What the first of these fields that there is says."""
        for field in fields:
            value = self.fields.get(field)
            if isinstance(value, str | int) and value != "":
                return str(value)
        return None


def foreign_records(file: TextFile, columns: Collection[str]) -> Iterator[ForeignRecord]:
    """All records of a file, in order; of columns only those named, and those that name a row.

    Raises:
        RecordError: a line is no JSON object, or the file holds no record.
        DamagedDataError, ConfigError: see `shared.raw_records`.
    """
    read = _lines(file) if file.format == "json" else _columns(file, {*columns, *NAMES})
    number = -1
    for number, (where, fields) in enumerate(read):
        yield ForeignRecord(where=where, number=number, fields=fields)
    if number < 0:
        raise RecordError(f"{file.name}: holds no records", next_step="take the file away, or fill it")


def _lines(file: TextFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            fields = json.loads(line)  # with the −Infinity that Python writes for padding
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: not JSON: {error}", next_step="give one object on each line") from None
        if not isinstance(fields, dict):
            raise RecordError(f"{where}: expected a JSON object, got {type(fields).__name__}")
        yield where, fields


def _columns(file: TextFile, columns: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    begin = 0
    for batch in column_batches(file, columns):
        arrays: dict[str, Any] = {name: batch.column(name) for name in batch.schema.names}
        for index in range(batch.num_rows):
            scalars = {name: array[index] for name, array in arrays.items()}
            fields = {
                name: getattr(scalar, "values", None) if hasattr(scalar, "values") else scalar.as_py()
                for name, scalar in scalars.items()
            }
            yield f"{file.name}[{begin + index}]", fields
        begin += batch.num_rows
