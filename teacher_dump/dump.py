"""Phase 1 from text files to a sealed dataset.

A first pass tokenizes everything, so that a bad record is found before the teacher has run for a night.  Then the
units are dumped, as `units` describes.  When all are done the dataset is sealed: tokenizer, card, and last of all the
manifest.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shared.card import dataset_card
from shared.dataset import CARD_NAME, TOKENIZER_FOLDER, LogitDataset
from shared.errors import MismatchError
from shared.files import TEMPORARY_PREFIX, claim_folder, sha256_of_file, sync_folder, write_atomically
from shared.fingerprint import sha256_of_text, tokenizer_fingerprint
from shared.manifest import MANIFEST_NAME, Input, InputFile, Shard, read_manifest, write_manifest
from shared.pretrained import context_tokens, load_tokenizer
from shared.progress import progress
from shared.records import RecordReader
from shared.text_config import TextSettings
from shared.text_rows import Tally, TextRows
from teacher_dump.config import DumpSettings
from teacher_dump.engines import open_engine, require_in_vocabulary, teacher_identity
from teacher_dump.keep import keep_rule
from teacher_dump.plan import Plan, commit_plan
from teacher_dump.scoring import Engine
from teacher_dump.units import WORK_FOLDER, Units, records_of_present_shards, require_same_units, storage_of

logger = logging.getLogger("logitferry")


def run_dump(
    settings: DumpSettings, *, load: Callable[..., AbstractContextManager[Engine]] = open_engine
) -> LogitDataset:
    """Dump everything that is not done yet, and seal.  `load` opens the teacher, where there is anything left to do.

    Raises:
        ConfigError, RecordError: the input cannot be used.
        MismatchError: the output folder belongs to a dump with other settings, input, teacher or tokenizer.
        NonFiniteError: the teacher's logits are not numbers.
    """
    output = Path(settings.output)
    claim_folder(output, [MANIFEST_NAME, WORK_FOLDER])
    (output / WORK_FOLDER).mkdir(exist_ok=True)
    tokenizer, identity = load_tokenizer(settings.teacher), teacher_identity(settings.teacher)
    rule = keep_rule(settings.keep, tokenizer)
    reader = RecordReader(settings.data)
    with TextRows(tokenizer, settings.data, context_tokens=context_tokens(settings.teacher)) as text:
        survey = _survey(reader, text)
        require_in_vocabulary(max(survey.largest_id, *rule.always_ids, 0), identity)
        template = tokenizer.chat_template
        plan = Plan(
            teacher=identity,
            vocab_size=identity.vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer.backend_tokenizer),
            chat_template_sha256=sha256_of_text(template) if isinstance(template, str) else None,
            keep=settings.keep.in_force(),
            temperatures=settings.temperatures,
            input=_input_identity(settings.data, reader, survey.tally),
            unit_records=settings.unit_records,
        )
        if (output / MANIFEST_NAME).is_file():
            sealed = LogitDataset.open(output)
            plan.require_same_as_manifest(sealed.manifest, output / MANIFEST_NAME)
            if not sealed.manifest.missing:
                shutil.rmtree(output / WORK_FOLDER)
                return sealed
            require_same_units(output, sealed.manifest, plan)
            commit_plan(plan, output / WORK_FOLDER)  # first: what is unsealed must have a plan to be checked against
            records_of_present_shards(output, sealed.manifest, plan)
            _unseal(output)
        commit_plan(plan, output / WORK_FOLDER)
        teacher = partial(load, settings.teacher, identity, rule, settings.temperatures)
        units = Units(
            output=output,
            plan=plan,
            text=text,
            storage=storage_of(settings, rule),
            open_engine=partial(teacher, longest_row=survey.longest_row),
        )
        shards = units.shards(reader)
    if _input_identity(settings.data, reader, survey.tally) != plan.input:
        raise MismatchError(
            f"{', '.join(settings.data.files)} changed while they were read: the dump is of neither version",
            next_step=f"remove {output} and dump again from files that stay as they are",
        )
    return _seal(output, plan, shards, tokenizer)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of all rows before the teacher is loaded."""

    tally: Tally
    largest_id: int
    longest_row: int


def _survey(reader: RecordReader, text: TextRows) -> Survey:
    """Tokenize everything once: every bad record is found before anything is run."""
    tally, largest_id, longest_row = Tally(), -1, 0
    with progress("read", None, "rows") as ticker:
        for row in text.rows(reader.records(), tally):
            largest_id = max(largest_id, int(row.input_ids_L.max()))
            longest_row = max(longest_row, row.num_tokens)
            ticker.advance()
    logger.info("read: %s", tally.summary())
    tally.require_rows()
    return Survey(tally=tally, largest_id=largest_id, longest_row=longest_row)


def _input_identity(settings: TextSettings, reader: RecordReader, tally: Tally) -> Input:
    files = [InputFile(name=Path(file.name).name, sha256=file.sha256()) for file in reader.files]
    # Not how many processes tokenize, which changes nothing.
    read_with = settings.model_dump(mode="json", exclude={"files", "processes"})
    return Input(files=files, settings=read_with, tally=asdict(tally))


def _unseal(output: Path) -> None:
    """Make a repaired dataset, whose shards have unit records, the unfinished dump that it is."""
    (output / MANIFEST_NAME).replace(output / WORK_FOLDER / MANIFEST_NAME)
    sync_folder(output / WORK_FOLDER)
    sync_folder(output)


def _seal(output: Path, plan: Plan, shards: list[Shard], tokenizer: Any) -> LogitDataset:
    work = output / WORK_FOLDER
    for leftover in output.rglob(f"{TEMPORARY_PREFIX}*"):  # of a run that was killed while it wrote
        leftover.unlink()
    tokenizer.save_pretrained(work / TOKENIZER_FOLDER)
    for path in filter(Path.is_file, (work / TOKENIZER_FOLDER).rglob("*")):
        write_atomically(output / path.relative_to(work), path.read_bytes())
    write_atomically(output / CARD_NAME, dataset_card(plan.manifest(shards, {}, [])).encode())
    paths = [output / CARD_NAME, *sorted((output / TOKENIZER_FOLDER).rglob("*"))]
    files = {path.relative_to(output).as_posix(): sha256_of_file(path) for path in paths if path.is_file()}
    unsealed = read_manifest(work).history if (work / MANIFEST_NAME).is_file() else []
    write_manifest(output, plan.manifest(shards, files, unsealed))
    sealed = LogitDataset.open(output)
    shutil.rmtree(work)
    return sealed
