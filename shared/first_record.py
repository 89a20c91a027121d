"""The first record of a config's text, and how it was understood; reads no further than it must."""

from dataclasses import dataclass

from shared.errors import ConfigError, RecordError
from shared.layout import NAME_THE_FIELDS, Layout, column_names, find_layout
from shared.raw_records import BadRecord, RawRecord, raw_records
from shared.records import Record
from shared.text_config import TextSettings
from shared.text_files import TextFile, find_text_files

MOST_SKIPPED = 1000


@dataclass(frozen=True, kw_only=True)
class FirstRecord:
    """`files` are all that the settings name; the record is one of the first of them."""

    files: list[TextFile]
    layout: Layout
    record: Record

    def describe(self) -> str:
        number = f"{len(self.files)} file{'s' * (len(self.files) > 1)}"
        return f"{number}; {self.record.where} is {self.layout.form} ({', '.join(self.layout.fields)})"


def first_record(settings: TextSettings) -> FirstRecord:
    """The first record that can be read; those before it are passed over where the settings let bad ones go.

    Raises:
        ConfigError: a file is missing, or no record of its beginning is of a known form.
        RecordError, DamagedDataError: the record cannot be used, or the file is damaged.
    """
    files = find_text_files(settings.files)
    for number, raw in enumerate(raw_records(files[0], columns=column_names(settings))):
        try:
            if isinstance(raw, BadRecord):
                raise raw.error
            return _understood(settings, files, raw)
        except RecordError:
            if settings.on_bad_record == "error":
                raise
        if number >= MOST_SKIPPED:
            break
    raise ConfigError(f"{files[0].name}: its first records are of no known form", next_step=NAME_THE_FIELDS)


def _understood(settings: TextSettings, files: list[TextFile], raw: RawRecord) -> FirstRecord:
    layout = find_layout(settings, raw)
    content = layout.content(raw, settings.system)
    for setting, name in (("id_field", settings.id_field), ("source_field", settings.source_field)):
        if name is not None and raw.fields.get(name) is None:
            there = ", ".join(map(repr, raw.fields))
            raise RecordError(
                f"{raw.where}: no field {name!r}, which data.{setting} names; there are {there}",
                next_step=f"name another field as data.{setting}, or none",
            )
    record = Record(sample_id="first", source=files[0].name, content=content, where=raw.where)
    return FirstRecord(files=files, layout=layout, record=record)
