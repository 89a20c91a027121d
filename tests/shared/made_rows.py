"""Rows with made-up teachers for tests of the format: ragged, with empty tails, unlike in every number."""

from typing import Any

import numpy as np

from shared.rows import LogitRow, Positions
from shared.schema import RowFormat

V = 1009
PATH = "data/part-00000.parquet"


def row_format(*temperatures: float, has_tails: bool = True) -> RowFormat:
    return RowFormat(vocab_size=V, temperatures=temperatures or (1.0,), has_tails=has_tails)


def random_row(state: np.random.Generator, name: str, num_tokens: int, num_tails: int) -> LogitRow:
    """Kept probabilities and the tail at T = 1 add up to one; the realised token is kept in half of the positions."""
    mask = state.random(num_tokens) < 0.6
    mask[:2] = False, True
    num_positions = int(mask.sum())
    counts = state.integers(1, 9, num_positions).astype(np.int32)
    ids = [np.sort(state.choice(V, count, replace=False)) for count in counts]
    p = [state.dirichlet(np.full(count + 1, 0.3)) + 1e-12 for count in counts]
    tail = -state.random((num_positions, num_tails)).astype(np.float32) * 9
    if num_tails:
        tail[:, 0] = np.log([each[-1] for each in p])
    tail[state.random(tail.shape) < 0.1] = -np.inf
    logp = [np.minimum(np.log(each[:-1]), 0).astype(np.float32) for each in p]
    input_ids = state.integers(0, V, num_tokens).astype(np.int32)
    realised = np.asarray([-30 * state.random() for _ in counts], dtype=np.float32)
    for position, t in enumerate(np.flatnonzero(mask)):
        if state.random() < 0.5:
            chosen = state.integers(counts[position])
            input_ids[t], realised[position] = ids[position][chosen], logp[position][chosen]
    return LogitRow(
        sample_id=name,
        source=f"file-{len(name) % 3}.jsonl",
        input_ids_L=input_ids,
        label_mask_L=mask,
        teacher=Positions(
            kept_counts_P=counts,
            kept_ids_E=np.concatenate([[], *ids]).astype(np.int32),
            kept_logp_E=np.concatenate([[], *logp]).astype(np.float32),
            realised_logp_P=realised,
            entropy_P=state.random(num_positions).astype(np.float32) * 4,
            tail_logsum_PT=tail,
        ),
    )


def random_rows(seed: int, num_rows: int, num_tails: int = 1) -> list[LogitRow]:
    state = np.random.default_rng(seed)
    return [random_row(state, f"row-{n}-é", int(state.integers(2, 40)), num_tails) for n in range(num_rows)]


def assert_same_rows(rows: list[LogitRow], others: list[LogitRow]) -> None:
    for row, other in zip(rows, others, strict=True):
        assert (row.sample_id, row.source) == (other.sample_id, other.source)
        np.testing.assert_array_equal(row.input_ids_L, other.input_ids_L)
        np.testing.assert_array_equal(row.label_mask_L, other.label_mask_L)
        assert_same_positions(row.teacher, other.teacher)


def assert_same_positions(positions: Any, others: Any) -> None:
    for name, values in vars(positions).items():
        np.testing.assert_array_equal(values, getattr(others, name), err_msg=name)
