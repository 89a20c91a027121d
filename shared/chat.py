"""Records to rows: the tokenizer's own chat template, and exactly the assistant's tokens supervised.

A template is a program that only knows how to render whole conversations.  What the assistant wrote in turn i
is found by rendering growing prefixes: everything up to the generation prompt before the turn, and everything
up to the turn.  Each must be a prefix of the whole conversation, to the letter; a template that rewrites
history is refused, because its mask could only be guessed.  A turn is supervised up to and including its
end-of-turn token; the line feed that many templates put behind it is not the assistant's.

The rendered text is tokenized as a whole, unless its first prompt alone gives other tokens, as where a token
would straddle the beginning of the answer.  Then the text is cut where answers begin and the pieces are tokenized
on their own, as at inference, where the prompt is tokenized before the answer exists; and where a token still
straddles an end, it is cut there too.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from shared.errors import MismatchError, RecordError
from shared.records import Record, TextSettings
from shared.rows import Row

ENCODE_BATCH_RECORDS = 256

Span = tuple[int, int]


@dataclass(kw_only=True)
class Tally:
    """What became of the records.  Nothing is dropped in silence: this goes to the log and the manifest."""

    records: int = 0
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    dropped_too_long: int = 0
    dropped_no_label: int = 0


class ChatEncoder:
    """Turns records into rows with one tokenizer and one set of text settings.

    `context_tokens` is the longest row that the model takes, where it has a limit.

    Raises:
        MismatchError: the tokenizer has no chat template, or is not backed by the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings, *, context_tokens: int | None = None) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise MismatchError(
                f"tokenizer {tokenizer.name_or_path!r} has no tokenizer.json, whose character offsets give the mask",
                next_step="convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...) with a fast tokenizer",
            )
        template = tokenizer.chat_template
        if not isinstance(template, str) or not template:
            number = "several chat templates" if template else "no chat template"
            raise MismatchError(
                f"tokenizer {tokenizer.name_or_path!r} has {number}",
                next_step="put one chat_template.jinja beside its tokenizer.json",
            )
        if "strftime_now" in template and "date_string" not in settings.chat_template_kwargs:
            raise MismatchError(
                f"the chat template of {tokenizer.name_or_path!r} reads the clock: the same record would give other "
                "tokens tomorrow",
                next_step="set data.chat_template_kwargs: {date_string: ...} to a date of your choice",
            )
        # A tokenizer.json may come with truncation or padding switched on, which would change rows in silence.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._settings = settings
        limits = {"data.max_tokens": settings.max_tokens, "the model's context": context_tokens}
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}
        special = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        named = tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)
        self._special: dict[int, str] = special | dict(zip(named, tokenizer.all_special_tokens, strict=True))
        any_special = "|".join(map(re.escape, sorted(self._special.values())))
        self._end_of_turn = re.compile(f"(?:{any_special})(?=\\s*\\Z)") if any_special else None

    def rows(self, records: Iterable[Record], tally: Tally) -> Iterator[Row]:
        """One row per record, in order; `tally` counts those that are dropped.

        Raises:
            RecordError: a conversation cannot be rendered, its mask cannot be found, or it is too long.
        """
        records = iter(records)
        while batch := list(islice(records, ENCODE_BATCH_RECORDS)):
            rendered = [self.render(record) for record in batch]
            encodings = self._encode([text for text, _ in rendered])
            prompts = self._encode([text[: spans[0][0]] if spans else "" for text, spans in rendered])
            for record, (text, spans), encoding, prompt in zip(batch, rendered, encodings, prompts, strict=True):
                row = self._row(record, text, spans, encoding, prompt.ids)
                tally.records += 1
                if self._is_kept(row, record, tally):
                    tally.rows += 1
                    tally.tokens += row.num_tokens
                    tally.positions += row.num_positions
                    yield row

    def render(self, record: Record) -> tuple[str, list[Span]]:
        """The conversation as text, and the character spans that the assistant wrote."""
        whole = self._template(record, record.messages, generation_prompt=False)
        spans: list[Span] = []
        for index, message in enumerate(record.messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise RecordError(f"{record.where}: the conversation opens with an assistant turn, nothing prompts it")
            before = self._template(record, record.messages[:index], generation_prompt=True)
            upto = self._template(record, record.messages[: index + 1], generation_prompt=False)
            for name, prefix in (("the prompt of", before), ("the conversation up to", upto)):
                if not whole.startswith(prefix):
                    at = next((i for i, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), len(whole))
                    around = slice(max(0, at - 30), at + 30)
                    raise RecordError(
                        f"{record.where}: the chat template rewrites history: {name} turn {index} renders as "
                        f"…{prefix[around]!r} but the whole as …{whole[around]!r}",
                        next_step="set chat_template_kwargs so that the template keeps earlier turns, "
                        "or split the conversation at its assistant turns",
                    )
            spans.append((len(before), len(before) + self._length_to_end_of_turn(upto[len(before) :])))
        return whole, spans

    def _length_to_end_of_turn(self, turn: str) -> int:
        found = self._end_of_turn.search(turn) if self._end_of_turn else None
        return found.end() if found else len(turn)

    def _template(self, record: Record, messages: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._settings.chat_template_kwargs,
            )
        except Exception as error:  # templates raise whatever they like, also by `raise_exception`
            raise RecordError(f"{record.where}: the chat template failed: {type(error).__name__}: {error}") from error

    def _encode(self, texts: list[str]) -> list[Any]:
        # The template writes the special tokens itself, BOS included.
        return self._tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    def _row(self, record: Record, text: str, spans: list[Span], encoding: Any, prompt_ids: list[int]) -> Row:
        ids = encoding.ids
        mask = self._mask(ids, encoding.offsets, text, spans)
        if mask is None or ids[: len(prompt_ids)] != prompt_ids:
            ids, mask = self._encode_pieces(record, text, spans, encoding)
        if mask and mask[0]:
            raise RecordError(f"{record.where}: the first token would be supervised, but nothing precedes it")
        return Row(
            sample_id=record.sample_id,
            input_ids_L=np.asarray(ids, dtype=np.int32),
            label_mask_L=np.asarray(mask, dtype=np.bool_),
        )

    def _encode_pieces(self, record: Record, text: str, spans: list[Span], whole: Any) -> tuple[list[int], list[bool]]:
        """Cut where answers begin and, where that is not enough, also where they end."""
        begins = {begin for begin, _ in spans}
        for cuts in (begins, begins.union(end for _, end in spans)):
            borders = sorted({0, *cuts, len(text)})
            ids: list[int] = []
            offsets: list[Span] = []
            for shift, piece in zip(borders, self._encode([text[a:b] for a, b in pairwise(borders)]), strict=False):
                ids += piece.ids
                offsets += [(start + shift, stop + shift) for start, stop in piece.offsets]
            mask = self._mask(ids, offsets, text, spans)
            if mask is not None and self._decode(ids) == self._decode(whole.ids):
                return ids, mask
        raise RecordError(
            f"{record.where}: a token straddles the border of an assistant turn, and this tokenizer does not "
            "give the same text back when the turns are tokenized on their own",
            next_step="let the chat template put a special token or a line feed before the answer",
        )

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def _mask(self, ids: list[int], offsets: list[Span], text: str, spans: list[Span]) -> list[bool] | None:
        """Which tokens lie inside a span; None where one straddles a border.

        Tokenizers may trim white space from a token's offsets.  What lies between two tokens belongs to the latter.
        An end-of-turn token may swallow the white space behind it (Phi-3's `<|end|>`); it is the turn's all the same.
        """
        if not offsets:
            return []
        starts, stops = np.asarray(offsets, dtype=np.int64).T
        starts = np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(stops)[:-1]]))
        mask = np.zeros(len(starts), dtype=np.bool_)
        for begin, end in spans:
            inside = (starts < end) & (stops > begin)
            for index in np.flatnonzero(inside & ((starts < begin) | (stops > end))):
                special = self._special.get(ids[index])
                if starts[index] < begin or special is None or not text.endswith(special, begin, end):
                    return None
            mask |= inside
        return mask.tolist()

    def _is_kept(self, row: Row, record: Record, tally: Tally) -> bool:
        exceeded = [f"{name} is {limit}" for name, limit in self._limits.items() if row.num_tokens > limit]
        if exceeded:
            if self._settings.on_too_long == "error":
                raise RecordError(
                    f"{record.where}: {row.num_tokens} tokens, but {' and '.join(exceeded)}",
                    next_step="set data.on_too_long: drop to leave such rows out and count them",
                )
            tally.dropped_too_long += 1
            return False
        if not row.num_positions:
            tally.dropped_no_label += 1
            return False
        return True
