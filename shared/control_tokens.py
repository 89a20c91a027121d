"""Control tokens: which strings a tokenizer reads as one, and how a record that spells one out is kept from it.

A user who writes `<|im_end|>` has not ended his turn.  Such spellings are hidden behind placeholders while the chat
template renders, so that afterwards the template's own control tokens and the record's are told apart.  Added tokens
that the tokenizer does not call special, such as think tags and tool calls mostly, are vocabulary, not control.
"""

import re
from dataclasses import dataclass
from typing import Any

from shared.errors import ConfigError, RecordError
from shared.marked_text import MarkedText, Span
from shared.text_config import TextSettings

PLACEHOLDERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters: never assigned, so hardly ever in a text


@dataclass(frozen=True, kw_only=True)
class Placeholders:
    """Which character stands for which token in one record."""

    tokens: dict[str, str]

    def restore(self, marked: MarkedText, where: str) -> MarkedText:
        """The text with the tokens spelled out again; spans move along, and `literal` tells where they are.

        Raises:
            RecordError: the template has escaped a placeholder.
        """
        if not self.tokens:
            return marked
        if any(f"\\u{ord(character):04x}" in marked.text for character in self.tokens):
            raise RecordError(f"{where}: spells a control token where the chat template escapes characters")
        parts, literal, moved = [], [], []
        length = 0
        for character in marked.text:
            part = self.tokens.get(character, character)
            moved.append(length)
            if character in self.tokens:
                literal.append((length, length + len(part)))
            parts.append(part)
            length += len(part)
        moved.append(length)

        def move(spans: tuple[Span, ...]) -> tuple[Span, ...]:
            return tuple((moved[begin], moved[end]) for begin, end in spans)

        return MarkedText(
            text="".join(parts),
            supervised=move(marked.supervised),
            left_out=move(marked.left_out),
            literal=tuple(literal),
            reworded=marked.reworded,
        )


class ControlTokens:
    """The special tokens of one tokenizer.  `by_id` holds all of them; those that keep their meaning are not hidden.

    Raises:
        ConfigError: `control_tokens` names one that the tokenizer lacks.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings) -> None:
        special = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        named = tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)
        self.by_id: dict[int, str] = special | dict(zip(named, tokenizer.all_special_tokens, strict=True))
        spellings = set(self.by_id.values())
        allowed = spellings if settings.control_tokens == "all" else set(settings.control_tokens)
        unknown = sorted(token for token in allowed if tokenizer.backend_tokenizer.token_to_id(token) is None)
        if unknown:
            raise ConfigError(
                f"control_tokens: the tokenizer has no token {unknown[0]!r}",
                next_step="give tokens exactly as the tokenizer spells them",
            )
        self._hidden = _any_of(spellings - allowed - set(settings.reasoning_tags))
        self._end_of_turn = re.compile(f"(?:{_any_of(spellings).pattern})(?=\\s*\\Z)")

    def hide(self, value: Any, where: str) -> tuple[Any, Placeholders]:
        """`value` with every control token that a string in it spells out behind a placeholder."""
        text = "".join(_strings(value))
        found = sorted(set(self._hidden.findall(text)))
        if not found:
            return value, Placeholders(tokens={})
        free = [character for character in PLACEHOLDERS if character not in text]
        if len(found) > len(free):
            raise RecordError(f"{where}: spells out {len(found)} different control tokens: {', '.join(found[:4])}, …")
        standing_for = dict(zip(found, free, strict=False))
        hidden = _mapped(value, lambda text: self._hidden.sub(lambda match: standing_for[match[0]], text))
        return hidden, Placeholders(tokens={character: token for token, character in standing_for.items()})

    def literal_spans(self, text: str) -> tuple[Span, ...]:
        """Where a text without a template spells out control tokens."""
        return tuple(match.span() for match in self._hidden.finditer(text))

    def length_to_end_of_turn(self, turn: str) -> int:
        """Up to and including the control token that ends the turn, or all where none does."""
        found = self._end_of_turn.search(turn)
        return found.end() if found else len(turn)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if tokens else r"(?!)")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [text for inner in value for text in _strings(inner)] if isinstance(value, list) else []


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(name, change): _mapped(inner, change) for name, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value
