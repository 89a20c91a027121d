"""What a file's records look like: their form, the fields that hold it, and what these say.

Forms: a chat under `messages` (OpenAI's turns, or ShareGPT's), a prompt with its response, plain text, ready tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.errors import RecordError
from shared.json_text import parse_json, require_whole_characters
from shared.raw_records import RawRecord
from shared.rows import Bool, Int32
from shared.text_config import TextSettings
from shared.turns import canonical_turn

MESSAGES_FIELDS = ("messages", "conversations")
PROMPT_FIELDS = ("prompt", "question")
RESPONSE_FIELDS = ("response", "completion", "answer")
TEXT_FIELD = "text"
TOKEN_FIELDS = ("input_ids", "label_mask")
BESIDE_CHATS = ("system", "tools")
ID_FIELDS = ("id", "sample_id")
NAME_THE_FIELDS = "name messages_field, prompt_field and response_field, or text_field; `form` decides between several"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Turns as Hugging Face's chat templates take them, and the definitions of the tools that may be called."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class PlainText:
    text: str


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Ready tokens and marks, kept as they are."""

    input_ids_L: Int32
    label_mask_L: Bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The form of a file's records, and the fields that hold it."""

    form: str
    fields: tuple[str, ...]

    def content(self, raw: RawRecord, system: str | None) -> Chat | PlainText | Tokens:
        """What a record says; `system` is for chats without a system turn.

        Raises:
            RecordError: a field is missing or holds something else; names place, field, expected and got.
        """
        if self.form == "tokens":
            return _tokens(raw)
        if self.form == "text":
            return PlainText(text=_string(raw, self.fields[0]))
        if self.form == "chat":
            turns = _turns(raw, self.fields[0])
        else:
            roles = zip(("user", "assistant"), self.fields, strict=True)
            turns = [{"role": role, "content": _string(raw, name)} for role, name in roles]
        return Chat(messages=_with_system(raw, turns, system), tools=_tools(raw))


def column_names(settings: TextSettings) -> set[str]:
    """Every field that the settings may want to read."""
    named = (settings.messages_field, settings.prompt_field, settings.response_field, settings.text_field)
    default = (*MESSAGES_FIELDS, *PROMPT_FIELDS, *RESPONSE_FIELDS, TEXT_FIELD, *TOKEN_FIELDS, *BESIDE_CHATS, *ID_FIELDS)
    return {*default, *filter(None, (*named, settings.id_field, settings.source_field))}


def find_layout(settings: TextSettings, raw: RawRecord) -> Layout:
    """The layout that the settings name, or the only one that this record has.

    Raises:
        RecordError: the record has none, or several.
    """
    candidates = {
        "chat": [(name,) for name in _named_or(settings.messages_field, MESSAGES_FIELDS)],
        "prompt_response": [
            (prompt, response)
            for prompt in _named_or(settings.prompt_field, PROMPT_FIELDS)
            for response in _named_or(settings.response_field, RESPONSE_FIELDS)
        ],
        "text": [(name,) for name in _named_or(settings.text_field, (TEXT_FIELD,))],
        "tokens": [TOKEN_FIELDS],
    }
    forms = {settings.form} if settings.form != "auto" else settings.named_forms() or candidates.keys()
    layouts = [Layout(form=form, fields=fields) for form in candidates if form in forms for fields in candidates[form]]
    if len(layouts) == 1:
        return layouts[0]  # there is nothing to choose; a record that lacks its fields will say so
    found = [layout for layout in layouts if all(raw.fields.get(name) is not None for name in layout.fields)]
    if len(found) == 1:
        return found[0]
    if not found:
        there = ", ".join(map(repr, raw.fields)) or "no field"
        raise RecordError(f"{raw.where}: a record of no known form; it has {there}", next_step=NAME_THE_FIELDS)
    several = " and ".join(f"{layout.form} ({', '.join(layout.fields)})" for layout in found)
    raise RecordError(f"{raw.where}: can be read in several ways: {several}", next_step=NAME_THE_FIELDS)


def _named_or(named: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if named is None else (named,)


def _field(raw: RawRecord, name: str, kind: type, expected: str) -> Any:
    if name not in raw.fields:
        there = ", ".join(map(repr, raw.fields)) or "none"
        raise RecordError(f"{raw.where}: no field {name!r}; there are {there}", next_step=NAME_THE_FIELDS)
    value = raw.fields[name]
    if not isinstance(value, kind):
        raise RecordError(f"{raw.where}: field {name!r}: expected {expected}, got {type(value).__name__} {value!r:.80}")
    return value


def _string(raw: RawRecord, name: str) -> str:
    return _field(raw, name, str, "a string")


def _turns(raw: RawRecord, name: str) -> list[dict[str, Any]]:
    turns = _field(raw, name, list, "a list of turns")
    if not turns:
        raise RecordError(f"{raw.where}: field {name!r}: expected a non-empty list, got []")
    return [canonical_turn(turn, f"{raw.where}: {name}[{index}]") for index, turn in enumerate(turns)]


def _with_system(raw: RawRecord, turns: list[dict[str, Any]], default: str | None) -> list[dict[str, Any]]:
    """A record may give its system turn in a field beside the turns, as LLaMA-Factory's do."""
    own = _string(raw, "system") if raw.fields.get("system") is not None else None
    has_turn = turns[0]["role"] in ("system", "developer")
    if own and has_turn:
        raise RecordError(f"{raw.where}: has a field 'system' and a system turn; which one is meant?")
    system = own or default
    return turns if has_turn or not system else [{"role": "system", "content": system}, *turns]


def _tools(raw: RawRecord) -> list[dict[str, Any]] | None:
    tools = raw.fields.get("tools")
    if isinstance(tools, str):  # columns cannot hold schemas of unlike shapes, so people store them as JSON
        where = f"{raw.where}: field 'tools'"
        tools = parse_json(tools, where) if tools.strip() else None
        require_whole_characters(tools, where)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RecordError(f"{raw.where}: field 'tools': expected a list of objects, got {tools!r:.80}")
    return tools or None


def _tokens(raw: RawRecord) -> Tokens:
    ids, marks = (_field(raw, name, list, "a list") for name in TOKEN_FIELDS)
    if not ids or len(ids) != len(marks):
        raise RecordError(f"{raw.where}: {len(ids)} input_ids and {len(marks)} marks of label_mask")
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise RecordError(f"{raw.where}: field 'input_ids': expected token ids, got {ids!r:.80}")
    if not all(type(mark) in (bool, int) and mark in (0, 1) for mark in marks):
        raise RecordError(f"{raw.where}: field 'label_mask': expected true and false, got {marks!r:.80}")
    if marks[0]:
        raise RecordError(f"{raw.where}: field 'label_mask': the first token is supervised, but nothing precedes it")
    return Tokens(input_ids_L=np.asarray(ids, dtype=np.int32), label_mask_L=np.asarray(marks, dtype=np.bool_))
