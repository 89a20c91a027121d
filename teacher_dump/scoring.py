"""Hidden states at supervised positions to what is stored of them, within bounded memory.  Shared by the engines.

Logits exist for one chunk of positions at a time.  Where memory does not suffice even so, the chunk is halved and
tried again, and stays at that size.

Shapes: N positions of a forward pass, D hidden, V = the teacher's config.vocab_size.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.device import block_bytes, free_cached_memory, is_out_of_memory
from shared.errors import LogitferryError, NonFiniteError
from shared.rows import Positions, Row
from teacher_dump.keep import Threshold, TopK, keep_chunk

logger = logging.getLogger("logitferry")

T = TypeVar("T")


class Engine(Protocol):
    """What runs the teacher."""

    def score(self, units: Iterable[Sequence[Row]]) -> Generator[list[Positions]]:
        """What the teacher says at every position of every row: for each unit a list in the order of its rows.

        A unit may be taken from `units` before the one before it is given back.
        """
        ...

    def close(self) -> None: ...


class Halved:
    """A size that is halved where memory does not suffice, and stays so."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def over(self, total: int, device: torch.device, work: Callable[[slice], T]) -> list[T]:
        """What `work` gives for runs of at most `size` out of `total`, in order.

        Raises:
            LogitferryError: there is not enough memory for one.
        """
        parts: list[T] = []
        begin = 0
        while begin < total:
            end = min(begin + self.size, total)
            try:
                parts.append(work(slice(begin, end)))
                begin = end
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Not within `except`, where the traceback still holds the tensors.
            if end - begin == 1:
                raise LogitferryError(
                    f"out of memory on {device} with {self.name} at 1",
                    next_step="leave more memory free, or spread the teacher over more devices",
                )
            self.size = (end - begin) // 2
            free_cached_memory(device)
            logger.warning("out of memory on %s: %s is %d from now on", device, self.name, self.size)
        return parts


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The positions of a forward pass: whose hidden state, which token came, and the numbers that `Threshold` draws."""

    label_N: NDArray[np.int64]
    draws_N: NDArray[np.float64] | None

    @staticmethod
    def of(rows: Sequence[Row], rule: TopK | Threshold) -> "Asked":
        """All positions of the rows, one row after the other."""
        draws = [rule.draws(row.sample_id, row.num_positions) for row in rows] if isinstance(rule, Threshold) else None
        return Asked(
            label_N=np.concatenate([row.label_ids_P for row in rows]).astype(np.int64),
            draws_N=None if draws is None else np.concatenate(draws),
        )

    def filled(self, multiple: int) -> "Asked":
        """With as many more positions as make their number a multiple."""
        num_more = -len(self.label_N) % multiple
        draws_N = None if self.draws_N is None else np.pad(self.draws_N, (0, num_more))
        return Asked(label_N=np.pad(self.label_N, (0, num_more)), draws_N=draws_N)


class Scorer:
    """Applies the output matrix and `keep_chunk`, a chunk at a time."""

    def __init__(
        self, rule: TopK | Threshold, temperatures: Sequence[float], *, vocab_size: int, chunk_positions: int
    ) -> None:
        self._rule, self._temperatures, self._vocab_size = rule, tuple(temperatures), vocab_size
        self.chunk = Halved("teacher.chunk_positions", chunk_positions)
        self.in_step_rows = Halved("positions in fp32", chunk_positions)

    def score(
        self,
        hidden_ND: Tensor,
        asked: Asked,
        logits_of: Callable[[Tensor], Tensor | None],
        *,
        in_step_with_others: bool = False,
    ) -> Positions | None:
        """What is stored of N positions, from their hidden states; None where `logits_of` gives none.

        With `in_step_with_others` every call of `logits_of` is one that other ranks make as well, so its chunks
        are not halved by one rank alone; what follows it may be, on a copy, since `keep_chunk` overwrites what it gets.
        """
        device = hidden_ND.device
        label_N = torch.from_numpy(asked.label_N).to(device)

        def keep(fp32_NV: Tensor, at: slice) -> Positions:
            draws = None if asked.draws_N is None else asked.draws_N[at]
            return keep_chunk(fp32_NV, label_N[at], self._rule, self._temperatures, draws).positions()

        def alone(at: slice) -> Positions | None:
            logits_NV = logits_of(hidden_ND[at])
            # An engine may pad the vocabulary; what lies beyond config.vocab_size is no outcome.
            return None if logits_NV is None else keep(logits_NV[:, : self._vocab_size].float().contiguous(), at)

        def in_step(at: slice) -> list[Positions]:
            logits_NV = logits_of(hidden_ND[at])

            def part(rows: slice) -> Positions:
                assert logits_NV is not None
                copy_NV = logits_NV[rows, : self._vocab_size].to(torch.float32, copy=True).contiguous()
                return keep(copy_NV, slice(at.start + rows.start, at.start + rows.stop))

            return [] if logits_NV is None else self.in_step_rows.over(len(logits_NV), device, part)

        parts: list[Positions | None] = []
        if in_step_with_others:
            size = self.chunk.size
            for begin in range(0, len(hidden_ND), size):
                parts += in_step(slice(begin, begin + size))
        else:
            parts = self.chunk.over(len(hidden_ND), device, alone)
        kept = [part for part in parts if part is not None]
        return Positions.concatenate(kept) if kept else None


def logits_bytes(chunk_positions: int, vocab_size: int, itemsize: int, device: torch.device) -> int:
    """Most that lives at once between hidden states and stored values: logits as they come and in fp32, and scratch."""
    return chunk_positions * vocab_size * (itemsize + 4) + block_bytes(device) // 2


def require_finite(row: Row, positions: Positions) -> None:
    """Raises NonFiniteError where the teacher's logits were no numbers, or rule the realised token out for certain."""
    bad_P = ~(np.isfinite(positions.realised_logp_P) & np.isfinite(positions.entropy_P))
    if bad_P.any():
        first = int(np.argmax(bad_P))
        token = int(row.source_index_P[first]) + 1
        raise NonFiniteError(
            f"row {row.sample_id!r}, token {token}: log p of the realised token is {positions.realised_logp_P[first]}",
            next_step="try teacher.dtype: float32; if it stays, look at this row; on_unscorable: skip lists it instead",
        )
