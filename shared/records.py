"""Raw records to what they mean: a chat, plain text, or ready tokens, each with a stable sample id.

The sample id is the record's own, or a digest of its content, so that it survives moving, splitting or reordering
the files.  The n-th repeat of one content gets `#n` behind the digest.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from shared.errors import ConfigError, RecordError
from shared.layout import ID_FIELDS, NAME_THE_FIELDS, Chat, Layout, PlainText, Tokens, column_names, find_layout
from shared.raw_records import BadRecord, RawRecord, raw_records
from shared.text_config import TextSettings
from shared.text_files import TextFile, find_text_files

CONTENT_ID_DIGITS = 32

ROLLOUT_SUFFIX = r"~[0-9a-f]{12}\.[0-9]+$"
"""Of a rollout's sample id, behind that of the row whose prompt it answers: who wrote it, and which reply it is."""

logger = logging.getLogger("logitferry")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample.  `where` is its place in the files, for messages to people."""

    sample_id: str
    source: str
    content: Chat | PlainText | Tokens
    where: str


class RecordReader:
    """The records of all files that the settings name.  Which files these are is settled when it is made.

    Raises:
        ConfigError: a file is missing, or of no form that can be read.
    """

    def __init__(self, settings: TextSettings) -> None:
        self.files = find_text_files(settings.files)
        self._settings = settings
        self._layouts: dict[str, Layout] = {}

    def records(self) -> Iterator[Record | BadRecord]:
        """All records, in order; one that cannot be used is a BadRecord in its place.

        Raises:
            ConfigError: none of a file's records is of a known form.
            RecordError, DamagedDataError: a file holds nothing, or is damaged.
        """
        seen_ids: dict[str, str] = {}
        repeats: Counter[str] = Counter()
        for file in self.files:
            for record in self._records_of(file, repeats):
                if isinstance(record, BadRecord):
                    yield record
                elif record.sample_id in seen_ids:  # also where an own id is the digest of another record's content
                    error = RecordError(
                        f"{record.where}: sample id {record.sample_id!r} is already used at "
                        f"{seen_ids[record.sample_id]}",
                        next_step="make the ids unique, or name another field as id_field",
                    )
                    yield BadRecord(error=error)
                else:
                    seen_ids[record.sample_id] = record.where
                    yield record

    def _records_of(self, file: TextFile, repeats: Counter[str]) -> Iterator[Record | BadRecord]:
        for raw in raw_records(file, columns=column_names(self._settings)):
            if isinstance(raw, BadRecord):
                yield raw
                continue
            try:
                content = self._layout(file, raw).content(raw, self._settings.system)
                own_id = _own_id(raw, self._settings.id_field)
                source = _source(raw, self._settings.source_field) or PurePosixPath(file.name).name
                sample_id = own_id or content_id(content)
            except RecursionError:
                yield BadRecord(error=RecordError(f"{raw.where}: is nested too deeply"))
                continue
            except RecordError as error:
                yield BadRecord(error=error)
                continue
            if own_id is None:
                repeats[sample_id] += 1
                if repeats[sample_id] > 1:
                    sample_id = f"{sample_id}#{repeats[sample_id]}"
            yield Record(sample_id=sample_id, source=source, content=content, where=raw.where)
        if file.name not in self._layouts:
            raise ConfigError(f"{file.name}: not one of its records is of a known form", next_step=NAME_THE_FIELDS)

    def _layout(self, file: TextFile, raw: RawRecord) -> Layout:
        """Told by the first record that can be read; all others must be like it."""
        layout = find_layout(self._settings, raw)
        if file.name not in self._layouts:
            logger.info("%s: read as %s (%s)", file.name, layout.form, ", ".join(layout.fields))
            self._layouts[file.name] = layout
        expected = self._layouts[file.name]
        if layout != expected:
            raise RecordError(
                f"{raw.where}: is {layout.form} ({', '.join(layout.fields)}), but the first record of the file is "
                f"{expected.form} ({', '.join(expected.fields)})",
                next_step=NAME_THE_FIELDS,
            )
        return expected


def content_id(content: Chat | PlainText | Tokens) -> str:
    """A sample id from what was said alone."""
    if isinstance(content, Tokens):
        value: Any = [content.input_ids_L.tolist(), content.label_mask_L.tolist()]
    elif isinstance(content, PlainText):
        value = content.text
    else:
        value = {"messages": content.messages, "tools": content.tools} if content.tools else content.messages
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:CONTENT_ID_DIGITS]


def first_of_repeats(sample_id: str) -> str:
    """The id of the first record of the same content; a record's own id is its own, whatever it looks like."""
    repeat = re.fullmatch(rf"([0-9a-f]{{{CONTENT_ID_DIGITS}}})#[0-9]+", sample_id)
    return repeat[1] if repeat else sample_id


def asked_of(sample_id: str) -> str:
    """The id of the row whose prompt a rollout answers; of anything else its own."""
    return re.sub(ROLLOUT_SUFFIX, "", sample_id)


def _source(raw: RawRecord, source_field: str | None) -> str | None:
    if source_field is None:
        return None
    value = raw.fields.get(source_field)
    if not isinstance(value, str) or value == "":
        raise RecordError(f"{raw.where}: field {source_field!r} for the source: expected a string, got {value!r}")
    return value


def _own_id(raw: RawRecord, id_field: str | None) -> str | None:
    present = [name for name in ([id_field] if id_field else ID_FIELDS) if raw.fields.get(name) is not None]
    if not present and id_field is not None:
        raise RecordError(f"{raw.where}: no field {id_field!r} for the sample id")
    if not present:
        return None
    value = raw.fields[present[0]]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RecordError(f"{raw.where}: field {present[0]!r}: expected a string or an integer, got {value!r}")
    return str(value)
