"""Rows to Arrow columns and back.  The columns are plain Parquet; FORMAT.md says what each means.

Nothing is nullable, so a reader never has to ask what a missing value would mean.  Reading checks all that
indexing and arithmetic will rely on: counts, ranges, order and finiteness.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import ConfigError, DamagedShardError, MisalignedRowError
from shared.rows import LogitRow, Positions

LOGP_TOLERANCE = 1e-4  # a log-probability may exceed 0 by fp32 rounding
LOGP_RANGE = (float(np.finfo(np.float32).min), LOGP_TOLERANCE)
ROUNDING_TOLERANCE = 0.25  # and a tail or entropy its maximum by the coarsest step that they are stored in
MAX_VALUES = (1 << 31) - 1
MAX_STRING_LENGTH = 1 << 16
"""Characters of a sample id or source."""
TEXT_COLUMNS = ("sample_id", "source", "input_ids", "label_mask", "storage_loss")
"""What the teacher did not say."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """What a dataset's columns are.  Ids lie in [0, vocab_size)."""

    vocab_size: int
    temperatures: tuple[float, ...]
    """The declared ones, 1 first."""
    has_tails: bool
    """Is there a tail for each of them?  Sampled ids have weights, and no tail."""

    @property
    def tail_temperatures(self) -> tuple[float, ...]:
        return self.temperatures if self.has_tails else ()

    @property
    def tail_columns(self) -> list[str]:
        return [f"tail_logsum_t{temperature:g}".replace(".", "_") for temperature in self.tail_temperatures]

    @property
    def position_columns(self) -> list[str]:
        """Those with one number for each position."""
        return ["realised_logprob", "entropy", *self.tail_columns]

    def schema(self) -> pa.Schema:
        columns: dict[str, pa.DataType] = {
            "sample_id": pa.string(),
            "source": pa.string(),
            "input_ids": _list_of(pa.int32()),
            "label_mask": _list_of(pa.bool_()),
            "kept_ids": _list_of(_list_of(pa.int32())),
            "kept_logprobs": _list_of(_list_of(pa.float32())),
            **{name: _list_of(pa.float32()) for name in self.position_columns},
            "storage_loss": _list_of(pa.float32()),
        }
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def leaf(name: str) -> str:
    """Where Parquet finds the values of a column."""
    if name in ("sample_id", "source"):
        return name
    return f"{name}.list.element.list.element" if name.startswith("kept_") else f"{name}.list.element"


def rows_to_table(rows: Sequence[LogitRow], teacher: Positions, loss_RT: Any, row_format: RowFormat) -> pa.Table:
    """One Arrow row per sequence, in order; `teacher` holds the positions of all rows as they shall be stored, and
    `loss_RT` what that lost in every row at each declared temperature."""
    token_counts = [row.num_tokens for row in rows]
    position_counts = [row.num_positions for row in rows]

    def per_position(values: Any) -> pa.ListArray:
        return _nest(pa.array(values), position_counts)

    arrays = [
        pa.array([row.sample_id for row in rows]),
        pa.array([row.source for row in rows]),
        _nest(pa.array(np.concatenate([row.input_ids_L for row in rows])), token_counts),
        _nest(pa.array(np.concatenate([row.label_mask_L for row in rows])), token_counts),
        _nest(_nest(pa.array(teacher.kept_ids_E), teacher.kept_counts_P), position_counts),
        _nest(_nest(pa.array(teacher.kept_logp_E), teacher.kept_counts_P), position_counts),
        per_position(teacher.realised_logp_P),
        per_position(teacher.entropy_P),
        *(per_position(np.ascontiguousarray(tail_P)) for tail_P in teacher.tail_logsum_PT.T),
        _nest(pa.array(loss_RT.astype(np.float32).ravel()), [loss_RT.shape[1]] * len(rows)),
    ]
    target = row_format.schema()
    return pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, target, strict=True)], schema=target
    )


def table_to_rows(table: pa.Table, row_format: RowFormat, where: str) -> list[LogitRow]:
    """The rows of a table, checked.

    Raises:
        DamagedShardError: columns, ids or numbers that no writer of this format produces.
        MisalignedRowError: a row without exactly one distribution per supervised token.
    """
    if not table.schema.equals(expected := row_format.schema()):
        raise DamagedShardError(f"{where}: expected the columns\n{expected}\nbut got\n{table.schema}")
    column: dict[str, Any] = {name: whole(table[name]) for name in table.column_names}
    if nulls := [name for name, values in column.items() if _has_null(values)]:
        raise DamagedShardError(f"{where}: column {nulls[0]} holds nulls")
    token_offsets = _offsets(column["input_ids"])
    position_offsets = _offsets(column["realised_logprob"])
    kept_counts_P = np.diff(_offsets(column["kept_ids"].flatten())).astype(np.int32)
    per_position: dict[str, Any] = {"label_mask": token_offsets} | dict.fromkeys(
        ("kept_ids", "kept_logprobs", "entropy", *row_format.tail_columns), position_offsets
    )
    for name, offsets in per_position.items():
        if not np.array_equal(_offsets(column[name]), offsets):
            raise MisalignedRowError(f"{where}: column {name} does not run beside the others")
    if not np.array_equal(np.diff(_offsets(column["kept_logprobs"].flatten())), kept_counts_P):
        raise MisalignedRowError(f"{where}: kept_logprobs does not run beside kept_ids")
    tails = [values_of(column[name]) for name in row_format.tail_columns]
    teacher = Positions(
        kept_counts_P=kept_counts_P,
        kept_ids_E=values_of(column["kept_ids"]),
        kept_logp_E=values_of(column["kept_logprobs"]),
        realised_logp_P=values_of(column["realised_logprob"]),
        entropy_P=values_of(column["entropy"]),
        tail_logsum_PT=np.stack(tails, axis=1) if tails else np.zeros((len(kept_counts_P), 0), np.float32),
    )
    input_ids = values_of(column["input_ids"])
    _check_values(teacher, input_ids, row_format.vocab_size, where)
    return _rows(column, token_offsets, position_offsets, input_ids, teacher, where)


def outlines_of(table: pa.Table, row_format: RowFormat, where: str) -> list[LogitRow]:
    """The rows of a table that has no more than text, realised_logprob and entropy: with no kept id and no tail.

    Raises:
        DamagedShardError, MisalignedRowError: as for `table_to_rows`.
    """
    column: dict[str, Any] = {name: whole(table[name]) for name in table.column_names}
    if nulls := [name for name, values in column.items() if _has_null(values)]:
        raise DamagedShardError(f"{where}: column {nulls[0]} holds nulls")
    tokens, positions = _offsets(column["input_ids"]), _offsets(column["realised_logprob"])
    for name, offsets in (("label_mask", tokens), ("entropy", positions)):
        if not np.array_equal(_offsets(column[name]), offsets):
            raise MisalignedRowError(f"{where}: column {name} does not run beside the others")
    num_positions = int(positions[-1])
    teacher = Positions(
        kept_counts_P=np.zeros(num_positions, dtype=np.int32),
        kept_ids_E=np.zeros(0, dtype=np.int32),
        kept_logp_E=np.zeros(0, dtype=np.float32),
        realised_logp_P=values_of(column["realised_logprob"]),
        entropy_P=values_of(column["entropy"]),
        tail_logsum_PT=np.zeros((num_positions, 0), dtype=np.float32),
    )
    input_ids = values_of(column["input_ids"])
    _check_ranges(_rules_of_text(teacher, input_ids, row_format.vocab_size), where)
    return _rows(column, tokens, positions, input_ids, teacher, where)


def row_losses(table: pa.Table, row_format: RowFormat, where: str) -> Any:
    """What storage lost in every row at each declared temperature [R, T]; raises DamagedShardError."""
    lists: Any = whole(table["storage_loss"])
    values, num_temperatures = values_of(lists), len(row_format.temperatures)
    if np.any(np.diff(_offsets(lists)) != num_temperatures) or not np.all((values >= 0) & (values < np.inf)):
        raise DamagedShardError(f"{where}: storage_loss is not one number of nats for each declared temperature")
    return values.reshape(table.num_rows, num_temperatures)


def _rows(
    column: dict[str, Any], token_offsets: Any, position_offsets: Any, input_ids: Any, teacher: Positions, where: str
) -> list[LogitRow]:
    rows: list[LogitRow] = []
    label_mask = values_of(column["label_mask"])
    sample_ids, sources = (_strings(column[name], name, where) for name in ("sample_id", "source"))
    for index, positions in enumerate(teacher.split(np.diff(position_offsets).tolist())):
        tokens = slice(token_offsets[index], token_offsets[index + 1])
        if not positions.num_positions:
            raise DamagedShardError(f"{where}:{index}: row {sample_ids[index]!r} has no supervised token")
        try:
            row = LogitRow(
                sample_id=sample_ids[index],
                source=sources[index],
                input_ids_L=input_ids[tokens],
                label_mask_L=label_mask[tokens],
                teacher=positions,
            )
        except MisalignedRowError as error:
            raise MisalignedRowError(f"{where}:{index}: {error}") from None
        rows.append(row)
    return rows


def _strings(column: Any, name: str, where: str) -> list[str]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DamagedShardError(f"{where}: column {name} holds {error.object[:40]!r}, which is not UTF-8") from None
    longest = max(map(len, values), default=0)
    if longest > MAX_STRING_LENGTH:
        raise DamagedShardError(
            f"{where}: column {name} holds {longest} characters, at most {MAX_STRING_LENGTH} may be"
        )
    return values


def _check_values(teacher: Positions, input_ids: Any, vocab_size: int, where: str) -> None:
    ids, counts_P = teacher.kept_ids_E, teacher.kept_counts_P
    first_E = np.zeros(len(ids), dtype=bool)
    first_E[(np.cumsum(counts_P, dtype=np.int64) - counts_P)[counts_P > 0]] = True
    most = math.log(vocab_size) + ROUNDING_TOLERANCE
    rules = _rules_of_text(teacher, input_ids, vocab_size) | {
        f"kept_ids lie in [0, {vocab_size})": _first_outside(ids, 0, vocab_size - 1),
        "kept_ids ascend within a position": _first_false(first_E[1:] | (ids[1:] > ids[:-1]), ids[1:]),
        "every position keeps an id": _first_false(counts_P > 0, counts_P),
        "kept_logprobs are finite and at most 0": _first_outside(teacher.kept_logp_E, *LOGP_RANGE),
        f"tail_logsum is a number or -inf, at most log {vocab_size}": _first_outside(
            teacher.tail_logsum_PT, -np.inf, most
        ),
    }
    _check_ranges(rules, where)


def _rules_of_text(teacher: Positions, input_ids: Any, vocab_size: int) -> dict[str, str | None]:
    """What must hold of the text and its labels, each with the first value that breaks it."""
    most = math.log(vocab_size) + ROUNDING_TOLERANCE
    return {
        f"input_ids lie in [0, {vocab_size})": _first_outside(input_ids, 0, vocab_size - 1),
        "realised_logprob is finite and at most 0": _first_outside(teacher.realised_logp_P, *LOGP_RANGE),
        f"entropy is finite and at least 0, at most log {vocab_size}": _first_outside(
            teacher.entropy_P, -LOGP_TOLERANCE, most
        ),
    }


def _check_ranges(rules: dict[str, str | None], where: str) -> None:
    if broken := [f"{rule}, got {first}" for rule, first in rules.items() if first]:
        raise DamagedShardError(f"{where}: does not hold: {'; '.join(broken)}")


def _first_outside(values: Any, low: float, high: float) -> str | None:
    """The first value that does not lie in [low, high], where there is one; NaN does not."""
    if not values.size or (values.min() >= low and values.max() <= high):
        return None
    return _first_false((values >= low) & (values <= high), values)


def _first_false(holds: Any, values: Any) -> str | None:
    if holds.all():
        return None
    at = int(np.argmin(holds.ravel()))
    return f"{values.ravel()[at]} (value {at})"


def _has_null(values: Any) -> bool:
    while pa.types.is_list(values.type):
        if values.null_count:
            return True
        values = values.flatten()
    return bool(values.null_count)


def _list_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def _nest(values: pa.Array, counts: Any) -> pa.ListArray:
    ends = np.cumsum(counts, dtype=np.int64)
    if len(ends) and ends[-1] > MAX_VALUES:
        raise ConfigError(f"{ends[-1]} values for one shard, at most {MAX_VALUES} fit", next_step="lower unit_records")
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=_list_of(values.type))


def whole(column: pa.ChunkedArray) -> Any:
    """As one array, without a copy where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _offsets(lists: Any) -> Any:
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[0]


def values_of(lists: pa.ListArray) -> Any:
    """The innermost values of a (nested) list array, without a copy where Arrow allows it."""
    values = lists.flatten()
    while pa.types.is_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)
