"""What other toolkits store: beside a row of tokens, at each index, a list of ids with log-probabilities.

Which token a list predicts is an `offset` that nobody writes down: the list at index i is about token i + offset.  Our
rows say it once and for all (`shared.rows`), so here is where one becomes the other.

Shapes: L tokens of a row and lists beside them, E entries of all its lists, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import RecordError
from shared.rows import Bool, Float32, Int32
from shared.schema import values_of

LEAST_LOGP = -1e6
"""Below it lies padding: −inf, or −1e9 where infinities were to be avoided."""


@dataclass(frozen=True, kw_only=True)
class ForeignRow:
    """One sequence as another toolkit has it, without padding; entries of a list by ascending id."""

    where: str
    """File and row, for messages."""
    sample_id: str
    source: str
    input_ids_L: Int32
    label_mask_L: Bool
    """Of the tokens that are supervised; the first is not."""
    counts_L: Int32
    """Entries of each list; 0 where there is none."""
    ids_E: Int32
    logp_E: Float32

    def without(self, indices: Sequence[int]) -> "ForeignRow":
        """With no entry in some of the lists."""
        is_gone_L = np.zeros(len(self.counts_L), dtype=np.bool_)
        is_gone_L[list(indices)] = True
        stays_E = ~np.repeat(is_gone_L, self.counts_L)
        counts_L = np.where(is_gone_L, 0, self.counts_L).astype(np.int32)
        return replace(self, counts_L=counts_L, ids_E=self.ids_E[stays_E], logp_E=self.logp_E[stays_E])

    def at(self, offset: int) -> "Aligned":
        """The lists that predict supervised tokens; a token that none predicts is not supervised."""
        tokens = np.flatnonzero(self.label_mask_L)
        indices = tokens - offset
        has_list = (indices >= 0) & (indices < len(self.counts_L))
        has_list[has_list] = self.counts_L[indices[has_list]] > 0
        label_mask_L = np.zeros_like(self.label_mask_L)
        label_mask_L[tokens[has_list]] = True
        is_taken_L = np.zeros(len(self.counts_L), dtype=np.bool_)
        is_taken_L[indices[has_list]] = True
        is_taken_E = np.repeat(is_taken_L, self.counts_L)
        return Aligned(
            label_mask_L=label_mask_L,
            counts_P=self.counts_L[is_taken_L],
            ids_E=self.ids_E[is_taken_E],
            logp_E=self.logp_E[is_taken_E],
            num_unlisted=int((~has_list).sum()),
        )


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """One list for each supervised token, in order."""

    label_mask_L: Bool
    counts_P: Int32
    ids_E: Int32
    logp_E: Float32
    num_unlisted: int
    """Tokens that were supervised and have no list."""


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A list of lists, as one array of all their values."""

    counts_L: Int32
    values_E: Any

    @staticmethod
    def of(value: Any, where: str) -> "Ragged":
        """Of Python's lists, or of an Arrow array of lists.

        Raises:
            RecordError: it is not a list of lists of numbers.
        """
        try:
            if isinstance(value, pa.Array):
                counts = value.value_lengths()  # pyright: ignore[reportAttributeAccessIssue]
                return Ragged(
                    counts_L=counts.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int32),
                    values_E=values_of(value),  # pyright: ignore[reportArgumentType]
                )
            inner = [each or [] for each in value]
            values = [-np.inf if each is None else each for each in chain.from_iterable(inner)]
            return Ragged(counts_L=np.array([len(each) for each in inner], dtype=np.int32), values_E=np.array(values))
        except (TypeError, ValueError, AttributeError, pa.ArrowException) as error:
            raise RecordError(f"{where}: expected a list of lists of numbers: {error}") from None


def flat(value: Any, where: str) -> Any:
    """One list of whole numbers as an array; raises RecordError."""
    array = value.to_numpy(zero_copy_only=False) if isinstance(value, pa.Array) else np.array(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise RecordError(
            f"{where}: expected a list of whole numbers, got one of {array.dtype} in {array.ndim} dimensions"
        )
    return array.astype(np.int64)


def rows_of(
    where: str,
    sample_id: str,
    source: str,
    *,
    input_ids_L: Any,
    is_label_L: Any,
    parts_L: Any,
    counts_L: Int32,
    ids_E: Any,
    logp_E: Any,
    vocab_size: int,
) -> list[ForeignRow]:
    """The row, cut where one sequence ends and another begins: runs of one number in `parts_L`; 0 is padding.

    Entries that are padding are left out.

    Raises:
        RecordError: unlike lengths, ids outside the vocabulary, an id twice in a list, log-probabilities that are none.
    """
    if ids_E.size and ids_E.dtype.kind not in "iu":
        raise RecordError(f"{where}: ids are whole numbers, got {ids_E.dtype}")
    lengths = {"labels": len(is_label_L), "attention_mask": len(parts_L), "the lists": len(counts_L)}
    if wrong := {name: length for name, length in lengths.items() if length != len(input_ids_L)}:
        raise RecordError(f"{where}: {len(input_ids_L)} input_ids, but {wrong}")
    list_E = np.repeat(np.arange(len(counts_L)), counts_L)
    _require(where, "is no number", list_E, ~np.isnan(logp_E), logp_E)
    is_entry_E = logp_E > LEAST_LOGP
    list_E, ids_E, logp_E = list_E[is_entry_E], ids_E[is_entry_E].astype(np.int64), logp_E[is_entry_E]
    order_E = np.lexsort((ids_E, list_E))
    list_E, ids_E, logp_E = list_E[order_E], ids_E[order_E], logp_E[order_E].astype(np.float32)
    _require(where, f"is no id of a vocabulary of {vocab_size}", list_E, (ids_E >= 0) & (ids_E < vocab_size), ids_E)
    is_outside_L = (input_ids_L < 0) | (input_ids_L >= vocab_size)
    if is_outside_L.any():
        first = int(is_outside_L.argmax())
        raise RecordError(
            f"{where}: token {first} is {input_ids_L[first]}, which is no id of a vocabulary of {vocab_size}",
            next_step="give the teacher's --vocab-size, which is its config's vocab_size",
        )
    is_new_E = np.ones(len(ids_E), dtype=np.bool_)
    is_new_E[1:] = (ids_E[1:] != ids_E[:-1]) | (list_E[1:] != list_E[:-1])
    _require(where, "stands twice in one list", list_E, is_new_E, ids_E)
    counts_L = np.bincount(list_E, minlength=len(counts_L)).astype(np.int32)
    ends_L = np.concatenate([[0], np.cumsum(counts_L, dtype=np.int64)])
    pieces = _runs(np.asarray(parts_L))
    rows: list[ForeignRow] = []
    for number, (begin, end) in enumerate(pieces):
        label_mask_L = np.array(is_label_L[begin:end], dtype=np.bool_)
        label_mask_L[0] = False
        rows.append(
            ForeignRow(
                where=where,
                sample_id=sample_id if len(pieces) == 1 else f"{sample_id}.{number}",
                source=source,
                input_ids_L=np.asarray(input_ids_L[begin:end], dtype=np.int32),
                label_mask_L=label_mask_L,
                counts_L=counts_L[begin:end],
                ids_E=ids_E[ends_L[begin] : ends_L[end]].astype(np.int32),
                logp_E=logp_E[ends_L[begin] : ends_L[end]],
            )
        )
    return rows


def _runs(parts_L: Any) -> Sequence[tuple[int, int]]:
    """Where runs of one number begin and end, those of 0 left out."""
    edges = [0, *(np.flatnonzero(np.diff(parts_L)) + 1).tolist(), len(parts_L)]
    return [(begin, end) for begin, end in pairwise(edges) if end > begin and parts_L[begin]]


def _require(where: str, what: str, list_E: Any, holds_E: Any, values_E: Any) -> None:
    if not holds_E.all():
        first = int((~holds_E).argmax())
        raise RecordError(f"{where}: the list at index {list_E[first]} holds {values_E[first]}, which {what}")
