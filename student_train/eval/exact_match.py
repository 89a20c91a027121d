"""Exact match: does a student that writes by itself come to the answer of the reference?

A row asks one question: all that stands before its last supervised span is the prompt, the span is the reference.  So
the prompt is the very ids that the row was trained or dumped with, and nothing is tokenized twice.  What cannot be
asked or checked is counted apart, and is neither right nor wrong.
"""

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch

from shared.errors import ConfigError
from shared.progress import progress
from shared.rows import Int32, Row, last_span
from student_train.eval.answers import find_answer, is_same
from student_train.eval.config import GenerateSettings
from student_train.eval.generation import Reply, Stops, Writer, text_of
from student_train.sources import Source
from student_train.stream import Selection

logger = logging.getLogger("logitferry")

RIGHT_EXAMPLES = 5
READ_ROWS = 256
CUT_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and what is expected."""

    sample_id: str
    source: str
    """The dataset or text that it is from."""
    prompt: list[int]
    expected: str


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Those of all rows that were drawn."""

    asked: list[Question]
    stops: Stops
    num_rows: int
    num_without_prompt: int
    num_uncheckable: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question in full; texts are as they are, control tokens included."""

    sample_id: str
    source: str
    prompt: str
    expected: str
    got: str | None
    """The reply's answer; None where it has none."""
    reply: str
    is_right: bool
    is_cut: bool


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """Of the rows that were drawn."""

    rows: int
    without_prompt: int
    """Rows that are supervised as a whole, as plain text is: there is nothing to ask."""
    uncheckable: int
    """Rows whose reference has no answer."""
    checkable: int
    right: int
    share: float
    """Of the checkable ones."""
    standard_error: float
    """Of the share, were the rows a draw of many: sqrt(share (1 − share) / checkable)."""
    cut: int
    """Replies that nothing ended but the limit."""
    shortened: int
    """Prompts so long that the context left a reply fewer than max_new_tokens."""
    mean_reply_tokens: float
    seconds: float
    tokens_per_s: float
    """Of the replies."""
    examples: list[Example]
    """The first wrong ones, and a few right ones."""


def draw(sources: Sequence[Source], num_rows: int | None, seed: int) -> list[Selection]:
    """So many rows of all sources together, or all; the same ones whatever order or shards the rows are in."""
    ids = [[name for block in source.sample_ids for name in block.to_pylist()] for source in sources]
    places = [(name, number) for number, names in enumerate(ids) for name in names]
    if num_rows is not None:
        places.sort(key=lambda place: (hashlib.sha256(f"{seed}/{place[0]}".encode()).digest(), place[1]))
    chosen = [{name for name, at in places[:num_rows] if at == number} for number in range(len(sources))]
    return [Selection.of(each.at(None), names.__contains__) for each, names in zip(sources, chosen, strict=True)]


def questions_of(selections: Sequence[Selection], model: Any, tokenizer: Any, settings: GenerateSettings) -> Questions:
    """What the rows ask; found out before a token is generated.

    Raises:
        ConfigError: there is nothing to ask, or no reference has an answer.
    """
    pattern = re.compile(settings.answer) if settings.answer else None
    spans, num_rows = asking_rows(selections)
    stops = stops_of(spans, model, tokenizer, settings.stop)
    asked, unanswered = [], []
    for each in spans:
        text = reference_text(each, stops, tokenizer)
        expected = find_answer(text, pattern)
        if expected is None:
            unanswered.append((each.row.sample_id, text))
            continue
        asked.append(
            Question(sample_id=each.row.sample_id, source=each.source, prompt=each.prompt_L.tolist(), expected=expected)
        )
    _report(num_rows, num_rows - len(spans), unanswered, len(asked))
    return Questions(
        asked=asked,
        stops=stops,
        num_rows=num_rows,
        num_without_prompt=num_rows - len(spans),
        num_uncheckable=len(unanswered),
    )


@dataclass(frozen=True, kw_only=True)
class AskingRow:
    """A row with a prompt, and where its reference lies."""

    row: Row
    source: str
    """The dataset or text that it is from."""
    begin: int
    end: int

    @property
    def prompt_L(self) -> Int32:
        return self.row.input_ids_L[: self.begin]


def asking_rows(selections: Sequence[Selection]) -> tuple[list[AskingRow], int]:
    """Those that ask something, and the number of all."""
    read = [(row, each.source.name) for each in selections for rows in each.in_order(READ_ROWS) for row in rows]
    spans = [(row, name, *last_span(row.label_mask_L)) for row, name in read]
    asking = [AskingRow(row=row, source=name, begin=begin, end=end) for row, name, begin, end in spans]
    # One token, which nothing could predict, is no prompt.
    return [each for each in asking if each.begin > 1], len(read)


def stops_of(asking: Sequence[AskingRow], model: Any, tokenizer: Any, stop: Sequence[str] = ()) -> Stops:
    """What ends a reply: see `Stops.of`, and the control tokens that end the references."""
    last = {int(each.row.input_ids_L[each.end - 1]) for each in asking}
    return Stops.of(model, tokenizer, stop).and_ids(last & control_ids(tokenizer))


def control_ids(tokenizer: Any) -> set[int]:
    """The special tokens, which a text does not spell."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def reference_text(asking: AskingRow, stops: Stops, tokenizer: Any) -> str:
    """As a reply's text would be: without what ends it."""
    ids = asking.row.input_ids_L[asking.begin : asking.end].tolist()
    return stops.before(text_of(tokenizer, ids[:-1] if ids[-1] in stops.ids else ids))


def _report(num_rows: int, num_without_prompt: int, unanswered: list[tuple[str, str]], num_asked: int) -> None:
    if num_without_prompt:
        logger.warning("%d of %d rows have no prompt before what is supervised", num_without_prompt, num_rows)
    if unanswered:
        sample_id, text = unanswered[0]
        found = f"{len(unanswered)} of {num_rows} references have no answer by generate.answer"
        if not num_asked:
            raise ConfigError(
                f"{found}, first {sample_id}: {text[-CUT_SHOWN:]!r}", next_step="mend the regular expression"
            )
        logger.warning("%s, first %s: %r", found, sample_id, text[-CUT_SHOWN:])
    if not num_asked:
        raise ConfigError(
            f"not one of {num_rows} rows has a prompt and a reference",
            next_step="give data of chats or prompts with responses, or leave generate away",
        )


def exact_match(
    questions: Questions,
    model: Any,
    tokenizer: Any,
    settings: GenerateSettings,
    *,
    context_tokens: int | None,
    compute_dtype: torch.dtype | None,
) -> ExactMatch:
    """Ask everything and check the replies.

    Raises:
        LogitferryError: there is not enough memory for one reply.
    """
    writer = Writer(
        model,
        tokenizer,
        stops=questions.stops,
        max_new_tokens=settings.max_new_tokens,
        batch_rows=settings.batch_rows,
        context_tokens=context_tokens,
        compute_dtype=compute_dtype,
    )
    begin_s = time.monotonic()
    with progress("generate", len(questions.asked), "rows") as ticker:
        prompts = [question.prompt for question in questions.asked]
        replies = writer.write(prompts, on_written=lambda written: ticker.advance(len(written)))
    seconds = time.monotonic() - begin_s
    pattern = re.compile(settings.answer) if settings.answer else None
    checked = [_checked(*each, pattern, tokenizer) for each in zip(questions.asked, replies, strict=True)]
    num_asked, num_right = len(checked), sum(each.is_right for each in checked)
    share, num_tokens = num_right / num_asked, sum(reply.num_tokens for reply in replies)
    return ExactMatch(
        rows=questions.num_rows,
        without_prompt=questions.num_without_prompt,
        uncheckable=questions.num_uncheckable,
        checkable=num_asked,
        right=num_right,
        share=share,
        standard_error=sqrt(share * (1 - share) / num_asked),
        cut=sum(reply.is_cut for reply in replies),
        shortened=sum(writer.room(each.prompt) < settings.max_new_tokens for each in questions.asked),
        mean_reply_tokens=num_tokens / num_asked,
        seconds=seconds,
        tokens_per_s=num_tokens / seconds,
        examples=_examples(checked, settings.examples),
    )


def _checked(question: Question, reply: Reply, pattern: re.Pattern[str] | None, tokenizer: Any) -> Example:
    got = find_answer(reply.text, pattern)
    return Example(
        sample_id=question.sample_id,
        source=question.source,
        prompt=text_of(tokenizer, question.prompt),
        expected=question.expected,
        got=got,
        reply=reply.text,
        is_right=is_same(question.expected, got, by_value=pattern is not None),
        is_cut=reply.is_cut,
    )


def _examples(checked: Sequence[Example], num_wrong: int) -> list[Example]:
    wrong = [each for each in checked if not each.is_right][:num_wrong]
    return wrong + [each for each in checked if each.is_right][: min(RIGHT_EXAMPLES, num_wrong)]
