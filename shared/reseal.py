"""What is done to sealed datasets: joined, freed of rows, or of shards that were damaged.  Each result is sealed anew,
and its manifest says what it was made from.

`merge` and `filter_rows` write a new folder and leave the old ones alone; on a crash the new one has no manifest and is
no dataset.  `repair` works in place: the manifest is replaced at once, and what it no longer names is then moved beside
the dataset, so that nothing is lost; on a crash, repair again.
"""

import difflib
import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pyarrow as pa

from shared.card import card_again, dataset_card, written_card
from shared.dataset import CARD_NAME, COPY_TOKENIZER, LogitDataset, shard_path
from shared.errors import ConfigError, DamagedDataError, MismatchError
from shared.files import claim_folder, sha256_of_bytes, why_no_file, write_atomically
from shared.fingerprint import require_same_tokenizer
from shared.licences import Licences, joined, licences_in
from shared.manifest import MANIFEST_NAME, UNSCORABLE_NAME, Event, Manifest, Shard, write_manifest
from shared.shard_reader import checked_bytes, tables_of
from shared.shard_writer import Storage, write_table
from shared.verification import strange_files, verify

OF_ONE_KIND = ("teacher", "vocab_size", "chat_template_sha256", "keep", "temperatures")
"""What datasets must share to be one; and the tokenizer."""

DAMAGED = "damaged: its sha256 is not the manifest's"

logger = logging.getLogger("logitferry")

OnShard = Callable[[], None]


def merge(datasets: Sequence[LogitDataset], output: Path, on_shard: OnShard = lambda: None) -> LogitDataset:
    """One dataset of all rows, in order; shards are copied byte for byte.

    Raises:
        ForeignTokenizerError: they differ in their tokenizers.
        MismatchError: they differ in teacher or settings, a sample id comes twice, or one is incomplete.
        DamagedShardError: a shard is not what was written.
    """
    first = datasets[0]
    for other in datasets[1:]:
        _require_one_kind(first, other)
    for dataset in datasets:
        _require_complete(dataset, "merge")
    _require_distinct_ids(datasets)
    claim_folder(output, [])
    shards: list[Shard] = []
    for dataset in datasets:
        for shard in dataset.manifest.shards:
            shards.append(_copy(dataset, shard, output, len(shards)))
            on_shard()
    history = [event for dataset in datasets for event in dataset.manifest.history]
    event = Event(operation="merge", parents=[dataset.identity() for dataset in datasets])
    unscorable = [other_files(dataset).get(UNSCORABLE_NAME, b"") for dataset in datasets]
    return seal_anew(
        output,
        first,
        {UNSCORABLE_NAME: b"".join(unscorable)} if any(unscorable) else {},
        licences=joined([licences_in(written_card(dataset)) for dataset in datasets]),
        inputs=[each for dataset in datasets for each in dataset.manifest.inputs],
        shards=shards,
        unit_records=None,
        history=[*history, event],
    )


def filter_rows(
    dataset: LogitDataset,
    output: Path,
    *,
    sample_ids: Collection[str] = (),
    sources: Collection[str] = (),
    reason: str | None = None,
    on_shard: OnShard = lambda: None,
) -> LogitDataset:
    """The dataset without the rows of these sample ids and sources; shards that have none of them are copied.

    Raises:
        ConfigError: no row is of these ids, a source is unknown, or no row would be left.
        DamagedShardError: a shard is not what was written.
    """
    _require_complete(dataset, "filter")
    manifest = dataset.manifest
    sample_ids = set(sample_ids)
    known_sources: set[str] = set()
    found_ids: set[str] = set()
    for table in map(dataset.names, range(len(manifest.shards))):
        known_sources |= set(table["source"].to_pylist())
        found_ids |= set(table["sample_id"].to_pylist()) & sample_ids
    _require_known(sources, known_sources)
    if sample_ids and not found_ids:
        raise ConfigError(f"{dataset.folder}: has none of the {len(sample_ids)} sample ids")
    if len(found_ids) < len(sample_ids):
        logger.warning("%d of %d sample ids are not in the dataset", len(sample_ids - found_ids), len(sample_ids))
    claim_folder(output, [])
    shards: list[Shard] = []
    storage = Storage(max_kl=manifest.keep.get("max_kl", 0.0))
    for index, shard in enumerate(manifest.shards):
        names = zip(*(dataset.names(index)[column].to_pylist() for column in ("sample_id", "source")), strict=True)
        wanted = [sample_id not in found_ids and source not in sources for sample_id, source in names]
        if all(wanted):
            shards.append(_copy(dataset, shard, output, len(shards)))
        elif any(wanted):
            data = checked_bytes(dataset.folder, shard, manifest.row_format)
            table = pa.concat_tables(tables_of(data, shard.path)).filter(pa.array(wanted))
            data, entry = write_table(table, manifest.row_format, storage, shard_path(len(shards)))
            write_atomically(output / entry.path, memoryview(data))
            shards.append(entry)
        on_shard()
    if not shards:
        raise ConfigError(f"{dataset.folder}: no row would be left", next_step=f"remove {output}, which is empty")
    event = Event(
        operation="filter",
        parents=[dataset.identity()],
        removed_rows=manifest.total("rows") - sum(shard.rows for shard in shards),
        removed_sources=sorted(sources),
        reason=reason,
    )
    return seal_anew(output, dataset, {}, shards=shards, unit_records=None, history=[*manifest.history, event])


def repair(dataset: LogitDataset, on_shard: OnShard = lambda: None) -> list[str]:
    """Take damaged and missing shards out of a dataset, in place, and name them in the manifest as missing, so that
    running the dump again makes them; write the card anew.  Returns their paths.

    What no longer belongs to the dataset is moved to a folder beside it, with the manifest as it was.

    Raises:
        DamagedDataError: the tokenizer is damaged and cannot be made from the rest, or not one shard is whole.
    """
    manifest, folder = dataset.manifest, dataset.folder
    try:
        other_files(dataset)
        dataset.tokenizer()
    except DamagedDataError as error:
        raise DamagedDataError(str(error.args[0]), next_step=f"{COPY_TOKENIZER}; {folder} is unchanged") from None
    found = verify(dataset, deep=True, on_shard=on_shard)
    if not found.faults:
        return []
    damaged = found.damaged_shards
    if len(damaged) == len(manifest.shards):
        raise DamagedDataError(
            f"{folder}: not one of its {len(damaged)} shards is whole, the first: "
            + str(found.faults[0]).partition("\n")[0],
            next_step="is all of it here, and may you read it?  Nothing was changed; else dump again",
        )
    if damaged:
        event = Event(operation="repair", parents=[dataset.identity()], removed_shards=damaged)
        changes = {
            "shards": [shard for shard in manifest.shards if shard.path not in damaged],
            "missing": sorted({*manifest.missing, *damaged}),
            "history": [*manifest.history, event],
        }
        manifest = manifest.model_copy(update=changes)
    aside = folder.resolve().with_name(f"{folder.resolve().name}.set-aside-{dataset.identity()[:8]}")
    write_atomically(aside / MANIFEST_NAME, (folder / MANIFEST_NAME).read_bytes())
    card = card_again(LogitDataset(folder=folder, manifest=manifest)).encode()
    write_atomically(folder / CARD_NAME, card)
    manifest = manifest.model_copy(update={"files": manifest.files | {CARD_NAME: sha256_of_bytes(card)}})
    write_manifest(folder, manifest)
    _set_aside(LogitDataset(folder=folder, manifest=manifest), aside)
    return damaged


def _require_one_kind(first: LogitDataset, other: LogitDataset) -> None:
    require_same_tokenizer(
        first.tokenizer(),
        other.tokenizer(),
        expected_name=str(first.folder),
        got_name=str(other.folder),
        next_step="merge datasets of one tokenizer; its fingerprint is in `logit-shards info`",
    )
    one, two = (dataset.manifest.model_dump(mode="json") for dataset in (first, other))
    for tree in (one, two):
        del tree["teacher"]["engine"]  # engines agree but for rounding
        if tree["teacher"]["weights_sha256"] or tree["teacher"]["revision"]:
            del tree["teacher"]["name"]  # a path, maybe, which says less than a digest
    for name in OF_ONE_KIND:
        if one[name] != two[name]:
            raise MismatchError(
                f"{other.folder} has {name} {two[name]}, but {first.folder} has {one[name]}",
                next_step="merge datasets of one teacher and setting; others can be trained on one after the other",
            )


def _require_complete(dataset: LogitDataset, verb: str) -> None:
    if dataset.manifest.missing:
        raise MismatchError(
            f"{dataset.folder}: {len(dataset.manifest.missing)} shards are missing",
            next_step=f"run its dump again, which makes them, then {verb}",
        )


def _require_distinct_ids(datasets: Sequence[LogitDataset]) -> None:
    seen: dict[str, Path] = {}
    for dataset in datasets:
        for sample_ids in dataset.sample_ids():
            for sample_id in sample_ids:
                if sample_id in seen:
                    raise MismatchError(
                        f"sample id {sample_id!r} is in {seen[sample_id]} and in {dataset.folder}",
                        next_step="logit-shards filter one of the two first",
                    )
            seen |= dict.fromkeys(sample_ids, dataset.folder)


def _require_known(sources: Collection[str], known: set[str]) -> None:
    for source in sources:
        if source not in known:
            near = difflib.get_close_matches(source, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known)[:10])}"
            raise ConfigError(f"no row is of source {source!r}; {hint}")


def other_files(dataset: LogitDataset) -> dict[str, bytes]:
    """Every file of a dataset but shards, card and manifest; raises DamagedDataError where one is not what it was."""
    found: dict[str, bytes] = {}
    for path, digest in dataset.manifest.files.items():
        if path == CARD_NAME:
            continue
        file = dataset.folder / path
        fault = why_no_file(dataset.folder, file)
        data = b"" if fault else file.read_bytes()
        if sha256_of_bytes(data) != digest:
            raise DamagedDataError(f"{file}: {fault or DAMAGED}")
        found[path] = data
    return found


def _copy(dataset: LogitDataset, shard: Shard, output: Path, number: int) -> Shard:
    data = checked_bytes(dataset.folder, shard, dataset.manifest.row_format)
    copy = shard.model_copy(update={"path": shard_path(number)})
    write_atomically(output / copy.path, memoryview(data))
    return copy


def seal_anew(
    output: Path, origin: LogitDataset, more: dict[str, bytes], *, licences: Licences | None = None, **changes: object
) -> LogitDataset:
    """The origin's other files, or `more` in their place, the card, and last of all the manifest, with `changes`.

    Licences are the origin's unless others are given.
    """
    licences = licences or licences_in(written_card(origin))
    files = other_files(origin) | more
    for path, data in files.items():
        write_atomically(output / path, data)
    manifest = origin.manifest.model_copy(update=changes)
    card = dataset_card(manifest, licences).encode()
    write_atomically(output / CARD_NAME, card)
    digests = {CARD_NAME: sha256_of_bytes(card)} | {path: sha256_of_bytes(data) for path, data in files.items()}
    write_manifest(output, Manifest.model_validate(manifest.model_copy(update={"files": digests}).model_dump()))
    return LogitDataset.open(output)


def _set_aside(dataset: LogitDataset, aside: Path) -> None:
    for name in strange_files(dataset):
        target = aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(dataset.folder / name, target)
        logger.info("%s: moved to %s", name, target)
