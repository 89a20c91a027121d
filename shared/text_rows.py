"""Text files to rows: what both phases start from.  Nothing is left out in silence: a tally counts it."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from types import TracebackType
from typing import Any

from shared.encode import BatchEncoder, Encoded
from shared.encoder_pool import EncoderPool
from shared.errors import RecordError
from shared.manifest import losses_line
from shared.raw_records import BadRecord
from shared.records import Record
from shared.rows import Row, fitted
from shared.text_config import TextSettings

ENCODE_BATCH_RECORDS = 256
LOGGED_BAD_RECORDS = 5

logger = logging.getLogger("logitferry")


@dataclass(kw_only=True)
class Tally:
    """What became of the records.  It goes to the log, the manifest and `info`."""

    records: int = 0
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    truncated: int = 0
    """Rows that were cut to the longest that is allowed."""
    dropped_too_long: int = 0
    dropped_no_label: int = 0
    """Records without a supervised token, or none that truncation left."""
    skipped_bad: int = 0
    reworded: int = 0
    """Rows of which the chat template has changed or shortened an answer, as where it drops reasoning."""
    unended: int = 0
    """Rows whose last answer ends without a control token: the student would not learn to stop there."""

    def count(self, fate: str | None) -> None:
        """One more record of this fate, if any."""
        if fate is not None:
            setattr(self, fate, getattr(self, fate) + 1)

    def summary(self) -> str:
        """One line for people."""
        counts = f"{self.records:,} records, {self.rows:,} rows, {self.tokens:,} tokens, {self.positions:,} supervised"
        return counts + losses_line(asdict(self))

    def require_rows(self) -> None:
        """Raises RecordError where nothing is left."""
        if not self.rows:
            raise RecordError(
                f"not one record gives a row: {self.summary()}", next_step="look at one with `logit-shards inspect`"
            )


class TextRows:
    """Turns records into rows with one tokenizer and one set of text settings.

    `context_tokens` is the longest row that the model takes, where it has a limit.  Use it in a `with` block, which
    ends the processes.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings, *, context_tokens: int | None = None) -> None:
        self._pool = EncoderPool(BatchEncoder(tokenizer, settings), settings.processes)
        self._settings = settings
        limits = {"max_tokens": settings.max_tokens, "the model's context": context_tokens}
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}
        self._logged: set[str] = set()

    def __enter__(self) -> "TextRows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.close()

    def rows(self, records: Iterable[Record | BadRecord], tally: Tally) -> Iterator[Row]:
        """One row per record, in order; `tally` counts those that are left out.

        Raises:
            RecordError: a record cannot become a row, or a longer one than allowed, and the settings do not let it go.
            MismatchError: there are chats, but the tokenizer's chat template cannot be used.
        """
        records = iter(records)
        batches = iter(lambda: list(islice(records, ENCODE_BATCH_RECORDS)), [])
        for batch, results in self._pool.encode(batches):
            for record, encoded in zip(batch, results, strict=True):
                tally.records += 1
                row = self._kept(record, encoded, tally)
                if row is not None:
                    tally.rows += 1
                    tally.tokens += row.num_tokens
                    tally.positions += row.num_positions
                    yield row

    def _kept(self, record: Record | BadRecord, encoded: Encoded, tally: Tally) -> Row | None:
        if isinstance(encoded, RecordError):
            if self._settings.on_bad_record == "error":
                raise encoded
            tally.skipped_bad += 1
            self._log_bad(encoded)
            return None
        row: Row | None = encoded.row
        exceeded = [f"{name} is {limit}" for name, limit in self._limits.items() if row.num_tokens > limit]
        if exceeded:
            assert isinstance(record, Record)
            if self._settings.on_too_long == "error":
                raise RecordError(
                    f"{record.where}: {row.num_tokens} tokens, but {' and '.join(exceeded)}",
                    next_step="set on_too_long: drop or truncate, which count such rows",
                )
            row, fate = fitted(row, min(self._limits.values()), truncate=self._settings.on_too_long == "truncate")
            tally.count(fate)
        elif not row.num_positions:
            row = None
            tally.count("dropped_no_label")
        if row is None:
            return None
        tally.reworded += encoded.reworded
        tally.unended += encoded.unended and not exceeded
        return row

    def _log_bad(self, error: RecordError) -> None:
        """The first few, each once, however often the records are read."""
        message = f"skipped: {error.args[0]}"
        if message in self._logged or len(self._logged) >= LOGGED_BAD_RECORDS:
            return
        self._logged.add(message)
        logger.warning(message)
        if len(self._logged) == LOGGED_BAD_RECORDS:
            logger.warning("further skipped records are counted only")
