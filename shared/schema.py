"""Rows to Arrow columns and back.  The columns are plain Parquet; FORMAT.md says what each means.

Nothing is nullable, so a reader never has to ask what a missing value would mean.  Reading checks all that
indexing and arithmetic will rely on: counts, ranges, order and finiteness.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import DamagedDataError, MisalignedRowError
from shared.rows import LogitRow, Positions

ROUNDING = 1e-4  # a log-probability may exceed 0 by fp32 rounding


def tail_column(temperature: float) -> str:
    return f"tail_logsum_t{temperature:g}".replace(".", "_")


def _list_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def schema(temperatures: Sequence[float]) -> pa.Schema:
    columns: dict[str, pa.DataType] = {
        "sample_id": pa.string(),
        "input_ids": _list_of(pa.int32()),
        "label_mask": _list_of(pa.bool_()),
        "kept_ids": _list_of(_list_of(pa.int32())),
        "kept_logprobs": _list_of(_list_of(pa.float32())),
        "realised_logprob": _list_of(pa.float32()),
        "entropy": _list_of(pa.float32()),
    } | {tail_column(temperature): _list_of(pa.float32()) for temperature in temperatures}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def rows_to_table(rows: Sequence[LogitRow], temperatures: Sequence[float]) -> pa.Table:
    """One Arrow row per sequence, in order."""
    teacher = Positions.concatenate([row.teacher for row in rows])
    token_counts = [row.num_tokens for row in rows]
    position_counts = [row.num_positions for row in rows]

    def per_position(values: Any) -> pa.ListArray:
        return _nest(pa.array(values), position_counts)

    arrays = [
        pa.array([row.sample_id for row in rows]),
        _nest(pa.array(np.concatenate([row.input_ids_L for row in rows])), token_counts),
        _nest(pa.array(np.concatenate([row.label_mask_L for row in rows])), token_counts),
        _nest(_nest(pa.array(teacher.kept_ids_E), teacher.kept_counts_P), position_counts),
        _nest(_nest(pa.array(teacher.kept_logp_E), teacher.kept_counts_P), position_counts),
        per_position(teacher.realised_logp_P),
        per_position(teacher.entropy_P),
        *(per_position(teacher.tail_logsum_PT[:, j]) for j in range(len(temperatures))),
    ]
    target = schema(temperatures)
    return pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, target, strict=True)], schema=target
    )


def table_to_rows(table: pa.Table, temperatures: Sequence[float], vocab_size: int, where: str) -> list[LogitRow]:
    """The rows of a table, checked.

    Raises:
        DamagedDataError: columns, ids or numbers that no writer of this format produces.
        MisalignedRowError: a row without exactly one distribution per supervised token.
    """
    expected = schema(temperatures)
    if not table.schema.equals(expected):
        raise DamagedDataError(f"{where}: expected the columns\n{expected}\nbut got\n{table.schema}")
    column: dict[str, Any] = {name: table[name].combine_chunks() for name in table.column_names}
    token_offsets = _offsets(column["input_ids"])
    position_offsets = _offsets(column["realised_logprob"])
    kept_counts_P = np.diff(_offsets(column["kept_ids"].flatten())).astype(np.int32)
    per_position: dict[str, Any] = {"label_mask": token_offsets} | dict.fromkeys(
        ("kept_ids", "kept_logprobs", "entropy", *map(tail_column, temperatures)), position_offsets
    )
    for name, offsets in per_position.items():
        if not np.array_equal(_offsets(column[name]), offsets):
            raise MisalignedRowError(f"{where}: column {name} does not run beside the others")
    if not np.array_equal(np.diff(_offsets(column["kept_logprobs"].flatten())), kept_counts_P):
        raise MisalignedRowError(f"{where}: kept_logprobs does not run beside kept_ids")
    teacher = Positions(
        kept_counts_P=kept_counts_P,
        kept_ids_E=_values(column["kept_ids"]),
        kept_logp_E=_values(column["kept_logprobs"]),
        realised_logp_P=_values(column["realised_logprob"]),
        entropy_P=_values(column["entropy"]),
        tail_logsum_PT=np.stack([_values(column[tail_column(temperature)]) for temperature in temperatures], axis=1),
    )
    input_ids, label_mask = _values(column["input_ids"]), _values(column["label_mask"])
    _check_values(teacher, input_ids, vocab_size, where)
    rows: list[LogitRow] = []
    for index, positions in enumerate(teacher.split(np.diff(position_offsets).tolist())):
        tokens = slice(token_offsets[index], token_offsets[index + 1])
        sample_id = column["sample_id"][index].as_py()
        if not positions.num_positions:
            raise DamagedDataError(f"{where}:{index}: row {sample_id!r} has no supervised token")
        try:
            row = LogitRow(
                sample_id=sample_id,
                input_ids_L=input_ids[tokens],
                label_mask_L=label_mask[tokens],
                teacher=positions,
            )
        except MisalignedRowError as error:
            raise MisalignedRowError(f"{where}:{index}: {error}") from None
        rows.append(row)
    return rows


def _check_values(teacher: Positions, input_ids: Any, vocab_size: int, where: str) -> None:
    ids, counts_P = teacher.kept_ids_E, teacher.kept_counts_P
    first_E = np.zeros(len(ids), dtype=bool)
    first_E[(np.cumsum(counts_P, dtype=np.int64) - counts_P)[counts_P > 0]] = True
    rules = {
        f"input_ids lie in [0, {vocab_size})": _in_range(input_ids, vocab_size),
        f"kept_ids lie in [0, {vocab_size})": _in_range(ids, vocab_size),
        "kept_ids ascend within a position": bool(np.all(first_E[1:] | (np.diff(ids.astype(np.int64)) > 0))),
        "every position keeps an id": bool(np.all(counts_P > 0)),
        "kept_logprobs are finite and at most 0": _is_logprob(teacher.kept_logp_E),
        "realised_logprob is finite and at most 0": _is_logprob(teacher.realised_logp_P),
        "entropy is finite and at least 0": bool(
            np.all(np.isfinite(teacher.entropy_P)) and np.all(teacher.entropy_P >= -ROUNDING)
        ),
        "tail_logsum is a number or -inf": bool(np.all(teacher.tail_logsum_PT < np.inf)),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise DamagedDataError(f"{where}: does not hold: {'; '.join(broken)}")


def _in_range(ids: Any, vocab_size: int) -> bool:
    return len(ids) == 0 or bool(ids.min() >= 0 and ids.max() < vocab_size)


def _is_logprob(values: Any) -> bool:
    return bool(np.all(np.isfinite(values)) and np.all(values <= ROUNDING))


def _nest(values: pa.Array, counts: Any) -> pa.ListArray:
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=_list_of(values.type))


def _offsets(lists: Any) -> Any:
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[0]


def _values(lists: pa.ListArray) -> Any:
    """The innermost values of a (nested) list array, without a copy where Arrow allows it."""
    values = lists.flatten()
    while pa.types.is_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)
