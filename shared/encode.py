"""Records to rows: render, tokenize, mark.  A pure function of records, so that several processes can do it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.chat import ChatRenderer, use_chat_template
from shared.control_tokens import ControlTokens
from shared.errors import MismatchError, RecordError
from shared.layout import Chat, PlainText, Tokens
from shared.marked_text import MarkedText
from shared.raw_records import BadRecord
from shared.records import Record
from shared.rows import Bool, Int32, Row
from shared.span_tokenizer import SpanTokenizer
from shared.text_config import TextSettings


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row, and what is odd about it."""

    row: Row
    reworded: bool = False
    """The chat template has changed or shortened an answer."""
    unended: bool = False
    """The last answer ends without a control token, so that the student would not learn to stop there."""


Encoded = EncodedRow | RecordError


class BatchEncoder:
    """Encodes with one tokenizer and one set of text settings.

    Raises:
        ConfigError, MismatchError: the tokenizer is not backed by the `tokenizers` library, or lacks a token that the
            settings name.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise MismatchError(
                f"tokenizer {tokenizer.name_or_path!r} has no tokenizer.json, whose character offsets give the mask",
                next_step="convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...) with a fast tokenizer",
            )
        use_chat_template(tokenizer, settings)
        self._tokenizer = tokenizer
        self._settings = settings
        self._control = ControlTokens(tokenizer, settings)
        self._spans = SpanTokenizer(tokenizer, self._control)
        self._renderer: ChatRenderer | None = None  # made when the first chat comes; text and tokens need no template
        self._before_text, self._behind_text = self._around_text()

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchEncoder, (self._tokenizer, self._settings)

    def encode(self, records: Sequence[Record | BadRecord]) -> list[Encoded]:
        """The row of each record, or why there is none.

        Raises:
            MismatchError: there are chats, but the tokenizer's chat template cannot be used.
        """
        encoded: dict[int, Encoded] = {}
        marked: dict[int, tuple[str, MarkedText]] = {}
        for place, record in enumerate(records):
            if isinstance(record, BadRecord):
                encoded[place] = record.error
            elif isinstance(record.content, Tokens):
                encoded[place] = self._ready_row(record, record.content)
            else:
                try:
                    marked[place] = record.where, self._mark(record.content, record.where)
                except RecordError as error:
                    encoded[place] = error
        for place, result in zip(marked, self._spans.label(list(marked.values())), strict=True):
            record = records[place]
            assert isinstance(record, Record)
            encoded[place] = result if isinstance(result, RecordError) else self._row(record, marked[place][1], *result)
        return [encoded[place] for place in range(len(records))]

    def _mark(self, content: Chat | PlainText, where: str) -> MarkedText:
        if isinstance(content, PlainText):
            text = content.text
            return MarkedText(text=text, supervised=((0, len(text)),), literal=self._control.literal_spans(text))
        if self._renderer is None:
            self._renderer = ChatRenderer(self._tokenizer, self._settings, self._control)
        return self._renderer.render(content, where)

    def _row(self, record: Record, marked: MarkedText, ids_L: Int32, mask_L: Bool) -> Encoded:
        if isinstance(record.content, PlainText):
            ids_L = self._with_ends(ids_L)
        if isinstance(record.content, PlainText) or self._settings.supervise == "everything":
            mask_L = np.ones(len(ids_L), dtype=np.bool_)
            mask_L[:1] = False  # nothing precedes it
        if mask_L[:1].any():
            return RecordError(f"{record.where}: the first token would be supervised, but nothing precedes it")
        row = Row(sample_id=record.sample_id, source=record.source, input_ids_L=ids_L, label_mask_L=mask_L)
        is_answer = isinstance(record.content, Chat) and self._settings.supervise != "everything"
        unended = is_answer and bool(row.num_positions) and int(row.label_ids_P[-1]) not in self._control.by_id
        return EncodedRow(row=row, reworded=marked.reworded, unended=unended)

    def _ready_row(self, record: Record, tokens: Tokens) -> Encoded:
        largest, size = int(tokens.input_ids_L.max()), len(self._tokenizer)
        if largest >= size:
            return RecordError(f"{record.where}: token id {largest}, but the tokenizer has {size} tokens")
        row = Row(
            sample_id=record.sample_id,
            source=record.source,
            input_ids_L=tokens.input_ids_L,
            label_mask_L=tokens.label_mask_L,
        )
        return EncodedRow(row=row)

    def _around_text(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and behind a text, and the end of sequence that is asked for."""
        encoding = self._tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
        own = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        before, behind = encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
        eos = self._tokenizer.eos_token_id
        return before, [eos] if self._settings.append_eos and eos is not None and not behind else behind

    def _with_ends(self, ids_L: Int32) -> Int32:
        """A text that spells its first or last control token out itself gets it once."""
        ids = ids_L.tolist()
        before = [] if self._before_text == ids[: len(self._before_text)] else self._before_text
        behind = [] if self._behind_text == ids[-len(self._behind_text) :] else self._behind_text
        return np.asarray([*before, *ids, *behind], dtype=np.int32)
