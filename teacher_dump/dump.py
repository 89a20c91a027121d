"""Phase 1 from text files to a sealed dataset: plan, dump what this worker has to do, seal.

    settings, input, teacher ──► plan ──► units to do ──► teacher ──► shard, then its record ──► manifest

Running again goes on: units that are done are checked and kept.  While the teacher scores one unit, the next is read
and tokenized in a thread, and the one before is encoded, hashed and written in another.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal

from shared.errors import ConfigError, MismatchError
from shared.folders import open_folder
from shared.manifest import MANIFEST_NAME, Manifest
from shared.overlap import Stopwatch, made_ahead, put_away
from shared.pretrained import context_tokens, load_tokenizer
from shared.progress import progress
from shared.records import RecordReader
from shared.rows import Positions
from shared.text_rows import TextRows
from shared.workers import Share, share_of_process
from teacher_dump.config import DumpSettings, RaySettings
from teacher_dump.engines import open_engine, require_in_vocabulary, teacher_identity
from teacher_dump.keep import keep_rule
from teacher_dump.ledger import OURS, EncodedUnit, Ledger, UnitRecord
from teacher_dump.plan import Plan
from teacher_dump.planning import contents_of, make_plan, tokenizer_files
from teacher_dump.scoring import Engine
from teacher_dump.seal import require_same_units, seal, unseal
from teacher_dump.units import Unit, UnitWork, read_units, scored_units, this_process

UNITS_AHEAD = 2

logger = logging.getLogger("logitferry")

Load = Callable[..., AbstractContextManager[Engine]]
Launcher = Literal["here", "ray"]


def run_dump(
    settings: DumpSettings,
    *,
    share: Share | None = None,
    launcher: Launcher = "here",
    plan_only: bool = False,
    load: Load = open_engine,
) -> Manifest | None:
    """Dump what is not done yet of this worker's share, and seal where nothing is left for anybody.

    `share` is by default that of the environment, see `shared.workers`; `load` opens the teacher in this process, where
    there is anything to do.  Returns None where units are left to others, or with `plan_only`.

    Raises:
        ConfigError, RecordError: the input cannot be used.
        MismatchError: the output folder belongs to a dump with other settings, input, teacher or tokenizer.
        NonFiniteError: the teacher's logits are not numbers.
        OutputError: the output cannot be written; what was committed before stays.
    """
    share = _share_of(launcher, share)
    ledger = Ledger(open_folder(settings.output))
    output = ledger.output
    output.claim(OURS)
    tokenizer, identity = load_tokenizer(settings.teacher), teacher_identity(settings.teacher)
    rule = keep_rule(settings.keep, tokenizer)
    reader = RecordReader(settings.data)
    context = context_tokens(settings.teacher)
    with TextRows(tokenizer, settings.data, context_tokens=context) as text:
        contents = contents_of(settings, reader, tokenizer, identity, context)
        if (sealed := ledger.sealed()) is not None:
            contents.require_same_as(sealed, f"{output.name}/{MANIFEST_NAME}")
            if not sealed.missing:
                ledger.clear()
                return sealed
            require_same_units(sealed, output.name, settings.unit_records)
        if (plan := ledger.plan()) is None:
            files = tokenizer_files(tokenizer)
            plan = make_plan(contents, settings.unit_records, reader, text, files)
            if (sealed := ledger.sealed()) is not None and not sealed.missing:  # by others, while this one read
                contents.require_same_as(sealed, f"{output.name}/{MANIFEST_NAME}")
                return sealed
            plan = ledger.commit_plan(plan, files)
        plan.require_same(contents, settings.unit_records, f"{output.name}: the plan")
        require_in_vocabulary(max(plan.largest_id, *rule.always_ids, 0), identity)
        if sealed is not None:
            unseal(ledger, sealed, plan)
        if plan_only:
            return None
        done = _done(ledger, plan, share, settings)
        if (sealed := ledger.sealed()) is not None:  # by others, and the records are gone
            return sealed
        todo = {number for number in range(plan.num_units) if share.has(number)} - done.keys()
        if done:
            logger.info("%d of %d units are done already", len(done), len(done) + len(todo))
        if todo:
            stop = threading.Event()
            units = made_ahead(read_units(reader, text, plan, todo, stop), UNITS_AHEAD, stop)
            work = UnitWork.of(settings, plan, rule)
            committed = (
                _by_ray(units, work, ledger, settings.ray)
                if launcher == "ray"
                else _here(units, work, ledger, f"{share} on {this_process()}", load)
            )
            with progress("dump", min(len(todo) * plan.unit_records, plan.tally["records"]), "records") as ticker:
                for unit in committed:
                    ticker.advance(unit.num_records)
    if (now := ledger.plan()) is not None and now.identity != plan.identity:
        raise MismatchError(
            f"{output.name}: another worker, who planned at the same moment, has other settings; what this one did is "
            "not taken as done",
            next_step="give both the same settings, or one of them another `output`",
        )
    if (sealed := seal(ledger)) is not None:  # maybe by that other worker
        contents.require_same_as(sealed, f"{output.name}/{MANIFEST_NAME}")
    return sealed


def _done(ledger: Ledger, plan: Plan, share: Share, settings: DumpSettings) -> dict[int, UnitRecord]:
    """The units of a share that need not be done, by their numbers; of others that have a record it is forgotten."""
    ours = {number: record for number, record in ledger.records(plan).items() if share.has(number)}
    if settings.on_unscorable == "error":  # what an earlier run was allowed to skip, this one is not
        ours = {number: record for number, record in ours.items() if not record.unscorable}
    intact = ledger.intact(ours.values())
    for number in ours.keys() - intact.keys():
        ledger.forget(number)
    return intact


def _here(units: Iterator[Unit], work: UnitWork, ledger: Ledger, worker: str, load: Load) -> Iterator[EncodedUnit]:
    """The units, committed; the teacher runs in this process."""

    def fail(number: int, error: Exception) -> None:
        ledger.fail(number, worker, error)

    def encode_and_commit(scored: tuple[Unit, list[Positions]]) -> EncodedUnit:
        unit, positions = scored
        try:
            encoded = work.encoded(unit, positions, worker)
        except Exception as error:
            fail(unit.number, error)
            raise
        return ledger.commit(encoded)

    watch = Stopwatch("text", "the teacher", "writing")
    ahead = watch.of("text", units)
    scored = watch.of("the teacher", scored_units(ahead, work.open_engine(load), fail))
    yield from watch.of("writing", put_away(encode_and_commit, scored, UNITS_AHEAD))
    logger.info("waited for %s", watch.summary())


def _by_ray(units: Iterator[Unit], work: UnitWork, ledger: Ledger, settings: RaySettings) -> Iterator[EncodedUnit]:
    """The same; replicas of the teacher run wherever Ray puts them, and this process alone writes."""
    from teacher_dump.ray_pool import encoded_by_replicas

    watch = Stopwatch("text", "the replicas", "writing")
    ahead = watch.of("text", units)
    encoded = watch.of("the replicas", encoded_by_replicas(ahead, work, settings, ledger.fail))
    yield from watch.of("writing", put_away(ledger.commit, encoded, UNITS_AHEAD))
    logger.info("waited for %s", watch.summary())


def _share_of(launcher: Launcher, given: Share | None) -> Share:
    if launcher == "ray":
        if given is not None:
            raise ConfigError("--worker and --launcher ray exclude each other", next_step="give one of the two")
        return Share()
    return share_of_process(given)
