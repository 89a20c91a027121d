"""The columns of axolotl's KD trainer, read and written.

`input_ids`, `labels` (−100 is not supervised), `attention_mask`, and beside each token `target_token_ids`,
`target_logprobs` and `target_mask`, lists of up to k entries.  Which token a list is about the columns do not say, and
releases differ: see `EXCHANGE.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import RecordError
from shared.exchange.lists import ForeignRow, Ragged, flat, rows_of
from shared.rows import LogitRow, Positions

NEEDED = ("input_ids", "labels", "target_token_ids", "target_logprobs")
COLUMNS = (*NEEDED, "attention_mask", "target_mask")
TRAINER_OFFSET = 1
"""The fused loss lays the list at index i against the hidden state there, which predicts token i + 1."""
IGNORED = -100


def schema() -> pa.Schema:
    """Of what is written."""
    lists = {"target_token_ids": pa.int32(), "target_logprobs": pa.float32(), "target_mask": pa.int8()}
    columns = {name: pa.list_(pa.int32()) for name in ("input_ids", "labels")} | {
        "attention_mask": pa.list_(pa.int8()),
        **{name: pa.list_(pa.list_(kind)) for name, kind in lists.items()},
    }
    return pa.schema(list(columns.items()))


def read(fields: Mapping[str, Any], where: str, sample_id: str, source: str, *, vocab_size: int) -> list[ForeignRow]:
    """The rows of a record: one, or several where sequences are packed.

    Raises:
        RecordError: a column is missing, or does not run beside the others; labels that are other tokens.
    """
    if lacking := [name for name in NEEDED if fields.get(name) is None]:
        raise RecordError(
            f"{where}: has no {' and no '.join(lacking)}",
            next_step=f"give records with the columns {', '.join(COLUMNS)}; see shared/EXCHANGE.md",
        )
    input_ids_L, labels_L = flat(fields["input_ids"], where), flat(fields["labels"], where)
    mask = fields.get("attention_mask")
    parts_L = np.ones(len(input_ids_L)) if mask is None else flat(mask, where)
    ids, logp = (Ragged.of(fields[name], f"{where}: {name}") for name in ("target_token_ids", "target_logprobs"))
    if not np.array_equal(ids.counts_L, logp.counts_L):
        raise RecordError(f"{where}: target_logprobs does not run beside target_token_ids")
    logp_E = logp.values_E.astype(np.float64)
    if fields.get("target_mask") is not None:
        marks = Ragged.of(fields["target_mask"], f"{where}: target_mask")
        if not np.array_equal(marks.counts_L, ids.counts_L):
            raise RecordError(f"{where}: target_mask does not run beside target_token_ids")
        logp_E = np.where(marks.values_E != 0, logp_E, -np.inf)
    is_label_L = labels_L != IGNORED
    _require_labels(where, input_ids_L, labels_L, is_label_L)
    return rows_of(
        where,
        sample_id,
        source,
        input_ids_L=input_ids_L,
        is_label_L=is_label_L,
        parts_L=parts_L,
        counts_L=ids.counts_L,
        ids_E=ids.values_E,
        logp_E=logp_E,
        vocab_size=vocab_size,
    )


def _require_labels(where: str, input_ids_L: Any, labels_L: Any, is_label_L: Any) -> None:
    if len(labels_L) != len(input_ids_L):
        raise RecordError(f"{where}: {len(input_ids_L)} input_ids, but {len(labels_L)} labels")
    differs_L = is_label_L & (labels_L != input_ids_L)
    if differs_L.any():
        at = int(differs_L.argmax())
        raise RecordError(
            f"{where}: label {at} is {labels_L[at]}, but token {at} is {input_ids_L[at]}",
            next_step="give labels that stand beside their own tokens, not shifted: the trainer shifts them",
        )


def table(rows: Sequence[LogitRow], *, offset: int, renormalised: bool) -> pa.Table:
    """Rows with the list about token t at index t − offset, entries by falling probability; elsewhere an empty list.

    `renormalised` lists add up to one, as axolotl's own preparation leaves them.  Raises nothing: rows are checked.
    """
    teacher = Positions.concatenate([row.teacher for row in rows])
    position_E = np.repeat(np.arange(teacher.num_positions), teacher.kept_counts_P)
    logp_E = teacher.kept_logp_E
    if renormalised:
        starts_P = np.cumsum(teacher.kept_counts_P) - teacher.kept_counts_P
        logp_E = logp_E - np.repeat(np.logaddexp.reduceat(logp_E.astype(np.float64), starts_P), teacher.kept_counts_P)
    order_E = np.lexsort((-logp_E, position_E))
    counts_T = np.concatenate([_counts(row, offset) for row in rows])
    lengths = [row.num_tokens for row in rows]
    input_ids_T = np.concatenate([row.input_ids_L for row in rows])
    mask_T = np.concatenate([row.label_mask_L for row in rows])

    def lists(values_E: Any) -> pa.Array:
        return _nested(_nested(pa.array(values_E), counts_T), lengths)

    columns = {
        "input_ids": _nested(pa.array(input_ids_T), lengths),
        "labels": _nested(pa.array(np.where(mask_T, input_ids_T, IGNORED)), lengths),
        "attention_mask": _nested(pa.array(np.ones(len(mask_T), dtype=np.int8)), lengths),
        "target_token_ids": lists(teacher.kept_ids_E[order_E]),
        "target_logprobs": lists(logp_E[order_E].astype(np.float32)),
        "target_mask": lists(np.ones(len(order_E), dtype=np.int8)),
    }
    target = schema()
    return pa.Table.from_arrays([columns[name].cast(target.field(name).type) for name in target.names], schema=target)


def _counts(row: LogitRow, offset: int) -> Any:
    counts_L = np.zeros(row.num_tokens, dtype=np.int32)
    counts_L[np.flatnonzero(row.label_mask_L) - offset] = row.teacher.kept_counts_P
    return counts_L


def _nested(values: pa.Array, counts: Any) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
