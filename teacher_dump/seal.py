"""Sealing: what is committed becomes a dataset.  Needs neither teacher nor torch, and any worker can do it.

Several may do it at once: they write the same bytes.  Whoever comes too late finds the manifest.
"""

import json
from collections import defaultdict

from shared.card import dataset_card
from shared.dataset import CARD_NAME, shard_path
from shared.errors import ConfigError, DamagedDataError, DamagedShardError, MismatchError, NonFiniteError
from shared.files import sha256_of_bytes
from shared.manifest import MANIFEST_NAME, UNSCORABLE_NAME, Event, Manifest, manifest_bytes, parse_manifest
from teacher_dump.ledger import UNSEALED_MANIFEST, Ledger, UnitRecord, Unscorable
from teacher_dump.plan import Plan


def seal(ledger: Ledger) -> Manifest | None:
    """The manifest of the dataset, written now or found there; None where units are left to do.

    Every shard is compared with its record once more: what is sealed is whole.

    Raises:
        ConfigError: no dump was begun in this folder.
        DamagedDataError: a shard is not what its record says, or a file of the tokenizer not what the plan says.
        NonFiniteError: not one row could be scored.
    """
    output = ledger.output
    plan, history = ledger.plan(), _history(ledger)
    records = ledger.records(plan) if plan is not None else {}
    # After what is needed was read: who seals removes it, but not before there is a manifest.
    if (sealed := ledger.sealed()) is not None:
        ledger.clear()
        return sealed
    if plan is None:
        raise ConfigError(f"{output.name}: no dump was begun here", next_step="teacher-dump run CONFIG begins one")
    if any(number not in records for number in range(plan.num_units)):
        return None
    intact = ledger.intact(records.values())
    if damaged := sorted(records.keys() - intact.keys()):
        names = ", ".join(shard_path(number) for number in damaged[:5])
        raise DamagedShardError(
            f"{output.name}: {len(damaged)} shards are not what was committed: {names}",
            next_step="run the same `teacher-dump run` again, which does these units again",
        )
    try:
        files = ledger.tokenizer_files(plan)
    except DamagedDataError:
        if (sealed := ledger.sealed()) is None:
            raise
        return sealed
    return _write(ledger, plan, [records[number] for number in range(plan.num_units)], files, history)


def _write(
    ledger: Ledger, plan: Plan, records: list[UnitRecord], files: dict[str, bytes], history: list[Event]
) -> Manifest:
    output = ledger.output
    shards = [record.shard for record in records if record.shard is not None]
    unscorable = [{"unit": record.number, **row.model_dump()} for record in records for row in record.unscorable]
    if not shards:
        raise NonFiniteError(f"{output.name}: not one row could be scored; the first: {unscorable[0]['reason']}")
    if unscorable:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in unscorable)
        files = files | {UNSCORABLE_NAME: lines.encode()}
    bare = plan.manifest(shards, unscorable=len(unscorable), files={}, history=history)
    files = files | {CARD_NAME: dataset_card(bare).encode()}
    digests = {path: sha256_of_bytes(data) for path, data in sorted(files.items())}
    data = manifest_bytes(bare.model_copy(update={"files": digests}))
    manifest = parse_manifest(data, f"{output.name}/{MANIFEST_NAME}")  # as a reader will: would it be taken?
    for path, content in files.items():
        output.write(path, content)
    output.write(MANIFEST_NAME, data)
    ledger.clear()
    return manifest


def unseal(ledger: Ledger, manifest: Manifest, plan: Plan) -> None:
    """Make a repaired dataset, some of whose shards are missing, the unfinished dump that it is.

    On a crash it is a sealed dataset still, and this is done again.  Nothing happens where others did it meanwhile.
    """
    output = ledger.output
    present = {shard.path: shard for shard in manifest.shards}
    unscorable: dict[int, list[Unscorable]] = defaultdict(list)
    if UNSCORABLE_NAME in manifest.files:
        for row in map(json.loads, output.read(UNSCORABLE_NAME).splitlines()):
            unscorable[row.pop("unit")].append(Unscorable(**row))
    for number in range(plan.num_units):
        if (path := shard_path(number)) not in manifest.missing:
            ledger.write_record(
                UnitRecord(
                    number=number,
                    plan=plan.identity,
                    shard=present.get(path),
                    unscorable=unscorable[number],
                    worker="before the repair",
                )
            )
    if ledger.sealed() == manifest:
        output.write(UNSEALED_MANIFEST, manifest_bytes(manifest))
        output.remove(MANIFEST_NAME)


def require_same_units(manifest: Manifest, where: str, unit_records: int) -> None:
    """Raises MismatchError where the shards of a dataset are not the units of this dump."""
    if manifest.unit_records != unit_records:
        then = manifest.unit_records
        raise MismatchError(
            f"{where}: {len(manifest.missing)} shards are missing, and "
            + (f"its units had {then} records, not {unit_records}" if then else "it was merged or filtered since"),
            next_step=f"set unit_records: {then}" if then else "dump into another `output`, then merge or filter again",
        )


def _history(ledger: Ledger) -> list[Event]:
    try:
        data = ledger.output.read(UNSEALED_MANIFEST)
    except FileNotFoundError:
        return []
    return parse_manifest(data, f"{ledger.output.name}/{UNSEALED_MANIFEST}").history
