"""A plan for a dump: its contents told from settings, teacher and input, and one reading of all records.

Everything is tokenized once, so that a bad record is found before the teacher has run for a night.  Who goes on with a
dump takes the plan that is there, compares the digests of everything it was made from, and need not read again.
"""

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.dataset import TOKENIZER_FOLDER
from shared.files import sha256_of_bytes
from shared.fingerprint import RowsDigest, sha256_of_json, sha256_of_text, tokenizer_fingerprint
from shared.manifest import Input, InputFile, Teacher
from shared.progress import progress
from shared.records import RecordReader
from shared.text_config import TextSettings
from shared.text_rows import Tally, TextRows
from teacher_dump.config import DumpSettings
from teacher_dump.plan import Contents, Plan

logger = logging.getLogger("logitferry")


def contents_of(
    settings: DumpSettings, reader: RecordReader, tokenizer: Any, teacher: Teacher, context_tokens: int | None
) -> Contents:
    """What a dump with these settings will hold; `tokenizer` has the chat template that is used."""
    template = tokenizer.chat_template
    return Contents(
        teacher=teacher,
        vocab_size=teacher.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer.backend_tokenizer),
        chat_template_sha256=sha256_of_text(template) if isinstance(template, str) else None,
        keep=settings.keep.in_force(),
        temperatures=settings.temperatures,
        input=_input(settings.data, reader, tokenizer, context_tokens),
    )


def make_plan(
    contents: Contents, unit_records: int, reader: RecordReader, text: TextRows, files: dict[str, bytes]
) -> Plan:
    """Read everything; `files` are the tokenizer's.

    Raises:
        RecordError: a record cannot become a row, or none does.
        ConfigError: there would be too many units.
    """
    tally, largest_id, longest_row = Tally(), -1, 0
    digests: list[RowsDigest] = []
    with progress("read", None, "rows") as ticker:
        for row in text.rows(reader.records(), tally):
            unit = (tally.records - 1) // unit_records
            digests += [RowsDigest() for _ in range(len(digests), unit + 1)]
            digests[unit].add(row)
            largest_id = max(largest_id, int(row.input_ids_L.max()))
            longest_row = max(longest_row, row.num_tokens)
            ticker.advance()
    logger.info("read: %s", tally.summary())
    tally.require_rows()
    num_units = -(-tally.records // unit_records)
    digests += [RowsDigest() for _ in range(len(digests), num_units)]
    plan = Plan(
        contents=contents,
        tally=asdict(tally),
        unit_digests=[digest.text() for digest in digests],
        longest_row=longest_row,
        largest_id=largest_id,
        unit_records=unit_records,
        files={path: sha256_of_bytes(data) for path, data in files.items()},
    )
    plan.require_few_units()
    return plan


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """As transformers saves them, by their paths in the dataset."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(filter(Path.is_file, Path(folder).rglob("*")))
        return {f"{TOKENIZER_FOLDER}/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in files}


def _input(settings: TextSettings, reader: RecordReader, tokenizer: Any, context_tokens: int | None) -> Input:
    # Not how many processes tokenize, which changes nothing, nor where the template lies, whose digest is known.
    read_with = settings.model_dump(mode="json", exclude={"files", "processes", "chat_template"})
    # The fingerprint knows vocabulary and merges; how text is cut before them, and what ends one, changes ids as well.
    how = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "special": tokenizer.special_tokens_map}
    read_with |= {"context_tokens": context_tokens, "tokenizer_sha256": sha256_of_json(how)}
    files = [InputFile(name=Path(file.name).name, sha256=file.sha256()) for file in reader.files]
    return Input(files=files, settings=read_with, tally={})
