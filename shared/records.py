"""Text files to records: OpenAI `messages`, or a prompt and a response under any two field names.

A record is one conversation with a stable sample id: its own `id`, or a digest of its content, so that the id
survives moving, splitting or reordering the files.  The n-th repeat of one content gets `#n` behind the digest.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from shared.config import Settings
from shared.errors import ConfigError, RecordError

ROLES = ("system", "developer", "user", "assistant", "tool")
CONTENT_ID_DIGITS = 32


class TextSettings(Settings):
    """Which text files to read and how their fields are called."""

    files: list[str]
    """JSONL files, in the order their rows shall have."""
    messages_field: str = "messages"
    """Field that holds a list of {role, content}."""
    prompt_field: str | None = None
    """Field of the user's turn, for records that are one prompt and one response."""
    response_field: str | None = None
    """Field of the assistant's turn."""
    id_field: str = "id"
    """Field of the sample id; records without it are named by a digest of their content."""
    system: str | None = None
    """System turn to put before prompt and response."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the tokenizer's chat template, e.g. {enable_thinking: false}."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest row; longer ones are an error or dropped, as `on_too_long` says."""
    on_too_long: str = "error"
    """error | drop (dropped rows are counted in the log and the manifest)"""

    @model_validator(mode="after")
    def _check(self) -> "TextSettings":
        if not self.files:
            raise ValueError("files names no file")
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field go together")
        if self.system is not None and self.prompt_field is None:
            raise ValueError("system goes with prompt_field and response_field; messages carry their own")
        reserved = {
            "tokenize",
            "add_generation_prompt",
            "conversation",
            "return_tensors",
        } & self.chat_template_kwargs.keys()
        if reserved:
            raise ValueError(f"chat_template_kwargs cannot hold {', '.join(sorted(reserved))}")
        if self.on_too_long not in ("error", "drop"):
            raise ValueError(f"on_too_long is error or drop, got {self.on_too_long!r}")
        return self


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation.  `where` is file:line, for messages to people."""

    sample_id: str
    messages: list[dict[str, Any]]
    where: str


def read_records(settings: TextSettings) -> Iterator[Record]:
    """All records of all files, in order.

    Raises:
        ConfigError: a file is missing.
        RecordError: a line is not a JSON object of the expected form, or a sample id comes twice; names the place.
    """
    seen_ids: dict[str, str] = {}
    repeats: Counter[str] = Counter()
    for name in settings.files:
        for where, fields in _json_lines(Path(name)):
            messages = _messages(fields, settings, where)
            sample_id = _own_id(fields, settings.id_field, where)
            if sample_id is None:
                sample_id = content_id(messages)
                repeats[sample_id] += 1
                if repeats[sample_id] > 1:
                    sample_id = f"{sample_id}#{repeats[sample_id]}"
            if sample_id in seen_ids:  # also where one record's own id is the digest of another's content
                raise RecordError(
                    f"{where}: sample id {sample_id!r} is already used at {seen_ids[sample_id]}",
                    next_step=f"make field {settings.id_field!r} unique, or name another field as id_field",
                )
            seen_ids[sample_id] = where
            yield Record(sample_id=sample_id, messages=messages, where=where)


def content_id(messages: list[dict[str, Any]]) -> str:
    """A sample id from what was said alone."""
    canonical = json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:CONTENT_ID_DIGITS]


def first_of_repeats(sample_id: str) -> str:
    """The id of the first record of the same content; a record's own id is its own, whatever it looks like."""
    repeat = re.fullmatch(rf"([0-9a-f]{{{CONTENT_ID_DIGITS}}})#[0-9]+", sample_id)
    return repeat[1] if repeat else sample_id


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ConfigError(
            f"input file {path} does not exist" + (" (it is a folder)" if path.is_dir() else ""),
            next_step="check `files`; paths are relative to the folder where the command is run",
        )
    num_records = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise RecordError(f"{where}: not UTF-8: {error}") from None
            except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
                raise RecordError(f"{where}: not a line of JSON: {error}") from None
            if not isinstance(fields, dict):
                raise RecordError(f"{where}: expected a JSON object, got {type(fields).__name__}")
            if b"\\u" in line:
                _require_whole_characters(fields, where)
            num_records += 1
            yield where, fields
    if not num_records:
        raise RecordError(f"{path}: holds no records", next_step="give a file with one JSON object on each line")


def _require_whole_characters(fields: dict[str, Any], where: str) -> None:
    """JSON can spell half a surrogate pair, which is no character: no digest, tokenizer or Parquet file takes it."""
    for name, value in fields.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RecordError(f"{where}: field {name!r}: holds half a surrogate pair, which is no character") from None


def _own_id(fields: dict[str, Any], id_field: str, where: str) -> str | None:
    value = fields.get(id_field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RecordError(f"{where}: field {id_field!r}: expected a string or an integer, got {value!r}")
    return str(value)


def _messages(fields: dict[str, Any], settings: TextSettings, where: str) -> list[dict[str, Any]]:
    if settings.prompt_field is not None and settings.response_field is not None:
        turns = [("user", settings.prompt_field), ("assistant", settings.response_field)]
        messages = [{"role": role, "content": _text(fields, field, where)} for role, field in turns]
        return ([{"role": "system", "content": settings.system}] if settings.system else []) + messages
    if fields.get("tools"):
        # Templates put the tools into the prompt; leaving them out would show the teacher another conversation.
        raise RecordError(f"{where}: field 'tools': tool definitions are not supported yet")
    turns = fields.get(settings.messages_field)
    if turns is None:
        raise RecordError(
            f"{where}: no field {settings.messages_field!r}; the record has {', '.join(map(repr, fields))}",
            next_step="name the two fields as prompt_field and response_field, or the chat as messages_field",
        )
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{where}: field {settings.messages_field!r}: expected a non-empty list, got {turns!r:.80}")
    return [_turn(turn, f"{where}: {settings.messages_field}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RecordError(f"{where}: expected an object with role and content, got {turn!r:.80}")
    if turn.get("role") not in ROLES:
        raise RecordError(f"{where}: role: expected one of {', '.join(ROLES)}, got {turn.get('role')!r}")
    _text(turn, "content", where)
    return turn


def _text(fields: dict[str, Any], field: str, where: str) -> str:
    if field not in fields:
        raise RecordError(
            f"{where}: no field {field!r}; there are {', '.join(map(repr, fields))}",
            next_step="name two of them as data.prompt_field and data.response_field, or mend the record",
        )
    value = fields[field]
    if not isinstance(value, str):
        raise RecordError(f"{where}: field {field!r}: expected a string, got {type(value).__name__} {value!r:.80}")
    return value
