"""Marked text to token ids and a label mask, by the tokenizer's character offsets.

A text is tokenized as a whole, unless one of its prompts alone gives other tokens, as where a token would straddle
the beginning of an answer.  Then it is cut where answers begin and the pieces are tokenized on their own, as at
inference, where the prompt is tokenized before the answer exists; and where a token still straddles an end, it is
cut there too.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from shared.control_tokens import ControlTokens
from shared.errors import MismatchError, RecordError
from shared.marked_text import MarkedText, Span
from shared.rows import Bool, Int32

CACHED_PROMPT_ENDS, CACHED_CHARACTERS = 4096, 256
UNTYPEABLE = "\ufdd0control"  # begins with a noncharacter; hidden spellings are restored by then


class Tokenized:
    """L token ids and the characters that each stands for: offsets [L, 2], and [starts_L, stops_L) made of them.

    Tokenizers may trim white space from a token's offsets.  What lies between two tokens belongs to the latter.
    """

    def __init__(self, ids_L: Any, offsets_L2: Any) -> None:
        self.ids_L: Int32 = np.asarray(ids_L, dtype=np.int32)
        self.offsets_L2 = np.asarray(offsets_L2, dtype=np.int64).reshape(-1, 2)
        starts_L, self.stops_L = self.offsets_L2.T
        self.starts_L = np.minimum(starts_L, np.concatenate([[0], np.maximum.accumulate(self.stops_L)])[:-1])

    def __len__(self) -> int:
        return len(self.ids_L)

    def touching(self, span: Span) -> Bool:
        """Which tokens have a character of the span."""
        return (self.starts_L < span[1]) & (self.stops_L > span[0])

    def touching_any(self, spans: Sequence[Span]) -> Bool:
        """Which tokens have a character of one of many spans, which are in order."""
        begins, ends = np.asarray(spans, dtype=np.int64).T
        last_before_L = np.searchsorted(begins, self.stops_L, side="left") - 1
        return (last_before_L >= 0) & (ends[last_before_L] > self.starts_L)

    @staticmethod
    def joined(parts: "Iterable[tuple[int, Tokenized]]") -> "Tokenized":
        """One after the other; each comes with the place where its text begins."""
        parts = list(parts)
        return Tokenized(
            np.concatenate([part.ids_L for _, part in parts]),
            np.concatenate([part.offsets_L2 + begin for begin, part in parts]),
        )

    def part(self, begin: int, end: int) -> "Tokenized":
        """The tokens [begin, end), at the places that they have here."""
        return Tokenized(self.ids_L[begin:end], self.offsets_L2[begin:end])


class SpanTokenizer:
    """Tokenizes marked text with a tokenizer that is backed by the `tokenizers` library."""

    def __init__(self, tokenizer: Any, control: ControlTokens) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer.json may come with truncation or padding switched on, which would change rows in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control = control
        self._opening = next(iter(control.by_id.values()), "")
        self._is_control = _IdSet(control.by_id)
        self._is_added = _IdSet([*control.by_id, *tokenizer.added_tokens_decoder])
        self._cached_ids = lru_cache(CACHED_PROMPT_ENDS)(self._ids)

    def label(self, texts: Sequence[tuple[str, MarkedText]]) -> list[tuple[Int32, Bool] | RecordError]:
        """Ids and label mask of each text, or why there are none; a text comes with its place in the files.

        A RecordError is for a token that straddles the border of an answer where cutting it changes the text, and
        for a control token that the tokenizer cannot spell out.  Special tokens are the template's to write, BOS
        included.
        """
        encodings = self._backend.encode_batch([marked.text for _, marked in texts], add_special_tokens=False)
        results: list[tuple[Int32, Bool] | RecordError] = []
        for (where, marked), encoding in zip(texts, encodings, strict=True):
            try:
                results.append(self._label(marked, Tokenized(encoding.ids, encoding.offsets), where))
            except RecordError as error:
                results.append(error)
        return results

    def _label(self, marked: MarkedText, whole: Tokenized, where: str) -> tuple[Int32, Bool]:
        tokenized = whole = self._spelt_out(whole, marked, where)
        mask_L = self._mask(whole, marked)
        if mask_L is None or not self._prompts_agree(whole, marked, where):
            tokenized, mask_L = self._in_pieces(marked, whole, where)
        for begin, end in marked.left_out:  # a token that reaches out of it has some of the answer, and stays
            mask_L &= (tokenized.starts_L < begin) | (tokenized.stops_L > end)
        return tokenized.ids_L, mask_L

    def _mask(self, tokenized: Tokenized, marked: MarkedText) -> Bool | None:
        """Which tokens lie inside a span; None where one straddles a border.

        An end-of-turn token may swallow the white space behind it (Phi-3's `<|end|>`); it is the turn's all the same.
        """
        mask_L = np.zeros(len(tokenized), dtype=np.bool_)
        for begin, end in marked.supervised:
            inside_L = tokenized.touching((begin, end))
            straddling_L = inside_L & ((tokenized.starts_L < begin) | (tokenized.stops_L > end))
            for index in np.flatnonzero(straddling_L):
                control = self._control.by_id.get(int(tokenized.ids_L[index]))
                starts_before = tokenized.starts_L[index] < begin
                if starts_before or control is None or not marked.text.endswith(control, begin, end):
                    return None
            mask_L |= inside_L
        return mask_L

    def _prompts_agree(self, whole: Tokenized, marked: MarkedText, where: str) -> bool:
        """Is what precedes each answer tokenized as it is without the answer?

        Added tokens are cut out of a text before anything else is done with it, so the piece from the last of them on
        decides; where a tokenizer does something else at the beginning of a text, the whole prompt does.
        """
        added_at = np.flatnonzero(self._is_added.of(whole.ids_L))
        for answer, _ in marked.supervised:
            end = int(np.searchsorted(whole.stops_L, answer, side="right"))
            last = int(np.searchsorted(added_at, end)) - 1
            first = int(added_at[last]) + 1 if last >= 0 else 0
            begins = {first: int(whole.stops_L[first - 1]) if first else 0, 0: 0}
            if not any(
                np.array_equal(self._prompt_ids(marked, begin, answer, where), whole.ids_L[token:end])
                for token, begin in begins.items()
            ):
                return False
        return True

    def _prompt_ids(self, marked: MarkedText, begin: int, end: int, where: str) -> Int32:
        if any(start < end and stop > begin for start, stop in marked.literal):
            return self._piece(marked, begin, end, where).ids_L
        text = marked.text[begin:end]
        return (self._cached_ids if len(text) <= CACHED_CHARACTERS else self._ids)(text, begin > 0)

    def _ids(self, text: str, inside: bool) -> Int32:
        return _tokenized(self._backend, text, self._opening if inside else "").ids_L

    def _in_pieces(self, marked: MarkedText, whole: Tokenized, where: str) -> tuple[Tokenized, Bool]:
        """Cut where answers begin and, where that is not enough, also where they end."""
        begins = {begin for begin, _ in marked.supervised}
        for cuts in (begins, begins.union(end for _, end in marked.supervised)):
            borders = sorted({0, *cuts, len(marked.text)})
            pieces = [(begin, self._piece(marked, begin, end, where)) for begin, end in pairwise(borders)]
            tokenized = Tokenized.joined(pieces)
            mask_L = self._mask(tokenized, marked)
            if mask_L is not None and self._decode(tokenized) == self._decode(whole):
                return tokenized, mask_L
        raise RecordError(
            f"{where}: a token straddles the border of an assistant turn, and this tokenizer does not "
            "give the same text back when the turns are tokenized on their own",
            next_step="let the chat template put a special token or a line feed before the answer",
        )

    def _piece(self, marked: MarkedText, begin: int, end: int, where: str) -> Tokenized:
        literal = tuple((start - begin, stop - begin) for start, stop in marked.literal if begin <= start < end)
        piece = MarkedText(text=marked.text[begin:end], supervised=(), literal=literal)
        return self._spelt_out(_tokenized(self._backend, piece.text, self._opening if begin else ""), piece, where)

    def _spelt_out(self, tokenized: Tokenized, marked: MarkedText, where: str) -> Tokenized:
        """Control tokens that the text spells out as text: all is done again between the real ones around them."""
        if not marked.literal:
            return tokenized
        is_literal_L = tokenized.touching_any(marked.literal)
        real = np.flatnonzero(self._is_control.of(tokenized.ids_L) & ~is_literal_L).tolist()
        parts: list[tuple[int, Tokenized]] = []
        for before, behind in pairwise([-1, *real, len(tokenized)]):
            begin = int(tokenized.stops_L[before]) if before >= 0 else 0
            end = int(tokenized.offsets_L2[behind, 0]) if behind < len(tokenized) else len(marked.text)
            if is_literal_L[before + 1 : behind].any():
                opening = UNTYPEABLE if before >= 0 else ""
                parts.append((begin, _tokenized(self._text_only, marked.text[begin:end], opening)))
            else:
                parts.append((0, tokenized.part(before + 1, behind)))
            parts.append((0, tokenized.part(behind, behind + 1)))
        result = Tokenized.joined(parts)
        is_control_L = self._is_control.of(result.ids_L)
        # Apart from spaces, which some tokenizers put behind every control token, the spelt ones included.
        same = self._decode(result).replace(" ", "") == self._decode(tokenized).replace(" ", "")
        if is_control_L.sum() != len(real) or not same:
            spelt = sorted({marked.text[begin:end] for begin, end in marked.literal})
            raise RecordError(
                f"{where}: spells out {', '.join(spelt)}, which this tokenizer cannot tokenize as text",
                next_step="take it out of the record, or let it keep its meaning: control_tokens: [...]",
            )
        return result

    @cached_property
    def _text_only(self) -> Tokenizer:
        """The same tokenizer, but nothing that can be typed is a control token to it."""
        tree = json.loads(self._backend.to_str())
        vocabulary = tree["model"]["vocab"]
        for token in tree["added_tokens"]:
            spelling, untypeable = token["content"], f"{UNTYPEABLE}{token['id']}"
            if token["id"] in self._control.by_id:
                token["content"] = untypeable
                if isinstance(vocabulary, dict) and spelling in vocabulary:
                    vocabulary[untypeable] = vocabulary.pop(spelling)
        text_only = Tokenizer.from_str(json.dumps(tree))
        if any(text_only.token_to_id(token["content"]) != token["id"] for token in tree["added_tokens"]):
            raise MismatchError(
                "records spell out control tokens, and this tokenizer cannot tokenize them as text",
                next_step="set control_tokens: all, so that they keep their meaning",
            )
        text_only.add_special_tokens([UNTYPEABLE])
        return text_only

    def _decode(self, tokenized: Tokenized) -> str:
        return self._backend.decode(tokenized.ids_L.tolist(), skip_special_tokens=False)


def _tokenized(tokenizer: Tokenizer, text: str, opening: str) -> Tokenized:
    """As it is behind the control token `opening`, if any; some tokenizers put a space before what begins a text."""
    encoding = tokenizer.encode(opening + text, add_special_tokens=False)
    first = 1 if opening else 0
    return Tokenized(encoding.ids[first:], np.asarray(encoding.offsets[first:]) - len(opening))


class _IdSet:
    """Which of many ids are in a set; a table up to the largest of the set, and one place for all beyond."""

    def __init__(self, ids: Iterable[int]) -> None:
        ids = list(ids)
        self._marks = np.zeros(max(ids, default=0) + 2, dtype=np.bool_)
        self._marks[ids] = True

    def of(self, ids_L: Int32) -> Bool:
        return self._marks[np.minimum(ids_L, len(self._marks) - 1)]
