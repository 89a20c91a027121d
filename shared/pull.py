"""A dataset at a path or URL to a folder on this machine, whole or in part.

What is pulled whole is the same dataset, byte for byte.  A part (some shards, or a share of the rows) is a dataset of
its own, made as `logit-shards filter` makes one: its manifest names the dataset that it comes from and what was left
out.

Every file is compared with its digest before it shows; the manifest is written last.  What lies there whole is not
fetched again, so whoever was interrupted runs the same command again.  Until the end `.pulling.json` says what is
pulled.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shared.card import dataset_card
from shared.dataset import CARD_NAME, LogitDataset, read_manifest_at
from shared.dataset_cache import COPY_AGAIN, LOCKS_FOLDER, Origin
from shared.errors import (
    ConfigError,
    DamagedDataError,
    DamagedShardError,
    LogitferryError,
    MismatchError,
    UnsealedDatasetError,
)
from shared.files import (
    TEMPORARY_PREFIX,
    claim_folder,
    require_apart,
    sha256_of_bytes,
    sha256_of_file,
    why_no_file,
    write_atomically,
)
from shared.folders import LocalFolder, open_folder
from shared.manifest import MANIFEST_NAME, Event, Manifest, Shard, parse_manifest
from shared.reseal import seal_anew
from shared.shard_reader import checked_bytes, tables_of
from shared.shard_writer import Storage, write_table
from shared.verification import verify

MARKER = ".pulling.json"
OTHER_FOLDER = "give another folder, or delete this one"
SAY_WHICH = (
    "--shards 0-3,7 for some shards, --share 0.1 for a tenth of the rows; `logit-shards info` says how many there are"
)

RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")

logger = logging.getLogger("logitferry")

OnFile = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which shards, by their place in the manifest, and how many rows of the last of them."""

    said: str
    """For people."""
    shards: tuple[int, ...]
    rows_of_last: int | None = None
    """None for all of them."""


@dataclass(kw_only=True)
class Pulled:
    """What was done."""

    folder: str
    source: str
    identity: str = ""
    source_identity: str = ""
    rows: int = 0
    shards: int = 0
    fetched: int = 0
    """Files."""
    kept: int = 0
    """Files that lay there already."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _DatasetFolder(LocalFolder):
    """A dataset from elsewhere, which is not to have us read other files: nobody compares the digest of a card."""

    def read(self, path: str) -> bytes:
        """Raises DamagedDataError for a link that leads out, and for pipes, besides what others raise."""
        file = self.path / path
        if (fault := why_no_file(self.path, file)) and file.exists():
            raise DamagedDataError(f"{file}: {fault}", next_step=COPY_AGAIN)
        return super().read(path)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset elsewhere, of which only the manifest was read."""

    origin: Origin
    manifest: Manifest
    manifest_data: bytes

    @staticmethod
    def open(url: str, output: Path) -> "Source":
        """The dataset at `url`, whose files come to `output`.

        Raises:
            ConfigError: nothing is known of such URLs, or one of the two lies in the other.
            OutputError: it cannot be reached.
            UnsealedDatasetError, UnknownVersionError, DamagedManifestError: it is no dataset that can be read.
        """
        remote = open_folder(url)
        if isinstance(remote, LocalFolder):
            require_apart(remote.path, output)
            remote = _DatasetFolder(remote.path)
        data = read_manifest_at(remote)
        manifest = parse_manifest(data, f"{remote.name}/{MANIFEST_NAME}")
        return Source(origin=Origin(remote, output), manifest=manifest, manifest_data=data)

    @property
    def name(self) -> str:
        return self.origin.remote.name

    @property
    def identity(self) -> str:
        return sha256_of_bytes(self.manifest_data)


def some_shards(manifest: Manifest, said: str) -> Part:
    """Shards by number, as `0-3,7`; the numbers are their places in the manifest, from 0.

    Raises:
        ConfigError: it is something else, or there are no such shards.
    """
    count, wanted = len(manifest.shards), set[int]()
    for each in said.split(","):
        if not (found := RANGE.fullmatch(each.strip())):
            raise ConfigError(f"--shards {said!r}: expected numbers such as 0-3,7", next_step=SAY_WHICH)
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < count:
            raise ConfigError(
                f"--shards {said!r}: there are {count} shards, from 0 to {count - 1}", next_step=SAY_WHICH
            )
        wanted |= set(range(first, last + 1))
    return Part(said=f"shards {said} of {count}", shards=tuple(sorted(wanted)))


def a_share(manifest: Manifest, share: float) -> Part:
    """That share of the rows, of shards that lie evenly over the dataset, the last of them cut.

    Evenly, since a dataset is often ordered by source; whole shards, since a row is not to be had for less.

    Raises:
        ConfigError: it is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--share {share:g}: expected a number above 0, and 1 at most", next_step=SAY_WHICH)
    rows = [shard.rows for shard in manifest.shards]
    wanted = max(1, math.ceil(share * sum(rows) - 1e-9))

    def spread(number: int) -> list[int]:
        return [(2 * n + 1) * len(rows) // (2 * number) for n in range(number)]

    few, many = 1, len(rows)
    while few < many:
        middle = (few + many) // 2
        enough = sum(rows[index] for index in spread(middle)) >= wanted
        few, many = (few, middle) if enough else (middle + 1, many)
    chosen, left = [], wanted
    for index in spread(many):
        if left > 0:
            chosen.append(index)
            left -= rows[index]
    said = f"{wanted:,} of {sum(rows):,} rows"
    return Part(said=said, shards=tuple(chosen), rows_of_last=rows[chosen[-1]] + left if left < 0 else None)


def pull(source: Source, part: Part | None = None, *, on_file: OnFile = lambda: None) -> Pulled:
    """Bring the dataset, or a part of it, to the folder; `on_file` is called after each file.

    Raises:
        ConfigError: the folder holds other things.
        MismatchError: it holds another dataset, or a part of another one.
        DamagedShardError: a file at the source is not what its manifest says.
        OutputError: the source cannot be reached, or the folder not be written.
    """
    origin, manifest, output = source.origin, source.manifest, source.origin.local
    done = Pulled(folder=str(output), source=source.name, source_identity=source.identity)
    event = None if part is None else _event(source, part)
    claim_folder(output, [MARKER, MANIFEST_NAME])
    if (output / MANIFEST_NAME).exists() and not (output / MARKER).exists():
        _require_same(source, event)
        if event is not None:
            return _told(done, output)
    with _marked(source, part):
        for path, sha256 in manifest.files.items():
            if path != CARD_NAME:
                _count(done, origin.provide(path, sha256))
                on_file()
        shards = manifest.shards if part is None else [manifest.shards[index] for index in part.shards]
        whole = shards if part is None or part.rows_of_last is None else shards[:-1]
        for shard in whole:
            _count(done, origin.provide(shard.path, shard.sha256))
            on_file()
        _provide_card(source)
        if part is None or event is None:
            write_atomically(output / MANIFEST_NAME, source.manifest_data)
        else:
            if len(whole) < len(shards):
                shards = [*whole, _cut(source, shards[-1], part.rows_of_last or 0)]
                _count(done, True)
                on_file()
            seal_anew(
                output,
                LogitDataset(folder=output, manifest=manifest),
                {},
                shards=shards,
                unit_records=None,
                history=[*manifest.history, event],
            )
    return _told(done, output)


def _event(source: Source, part: Part) -> Event:
    manifest = source.manifest
    if manifest.missing:
        raise MismatchError(
            f"{source.name}: {len(manifest.missing)} shards are missing",
            next_step="pull it whole, or run its dump again, which makes them, and push it again",
        )
    rows = sum(manifest.shards[index].rows for index in part.shards)
    if part.rows_of_last is not None:
        rows -= manifest.shards[part.shards[-1]].rows - part.rows_of_last
    return Event(
        operation="filter",
        parents=[source.identity],
        removed_rows=manifest.total("rows") - rows,
        reason=f"pulled from {source.name}: {part.said}",
    )


def _require_same(source: Source, event: Event | None) -> None:
    """Raises MismatchError unless the folder holds what would be pulled; DamagedShardError where that is damaged."""
    output = source.origin.local
    if event is None:
        if (output / MANIFEST_NAME).read_bytes() == source.manifest_data:
            return
    else:
        there = LogitDataset.open(output)
        last = there.manifest.history[-1:]
        if [(each.parents, each.reason) for each in last] == [(event.parents, event.reason)]:
            if faults := verify(there, deep=False).faults:
                raise DamagedShardError(faults[0], next_step=f"delete {output} and pull it again")
            return
    raise MismatchError(f"{output} holds another dataset than {source.name}", next_step=OTHER_FOLDER)


@contextmanager
def _marked(source: Source, part: Part | None) -> Iterator[None]:
    """The folder says what is pulled, until all of it is there.  Raises MismatchError where it says something else."""
    output = source.origin.local
    marker = json.dumps({"source": source.identity, "part": None if part is None else part.said}).encode()
    path = output / MARKER
    if path.exists() and path.read_bytes() != marker:
        raise MismatchError(f"{output} holds a part of something else that was to be pulled", next_step=OTHER_FOLDER)
    write_atomically(path, marker)
    for left in output.rglob(f"{TEMPORARY_PREFIX}*"):  # by those who were killed
        left.unlink(missing_ok=True)
    try:
        yield
    except DamagedShardError:
        if _has_changed(source):
            raise MismatchError(
                f"{source.name} became another dataset while it was pulled",
                next_step=f"delete {output}, then run the same command again",
            ) from None
        raise
    path.unlink()
    shutil.rmtree(output / LOCKS_FOLDER, ignore_errors=True)


def _has_changed(source: Source) -> bool:
    """Is another dataset there now, or on its way?"""
    try:
        return read_manifest_at(source.origin.remote) != source.manifest_data
    except UnsealedDatasetError:
        return True
    except LogitferryError:  # which is told when it is run again
        return False


def _provide_card(source: Source) -> None:
    """As it is there, which nothing vouches for; but what somebody has written here since it was pulled stays."""
    here, was_pulled = source.origin.local / CARD_NAME, (source.origin.local / MANIFEST_NAME).exists()
    try:
        card = source.origin.remote.read(CARD_NAME)
    except FileNotFoundError:
        card = dataset_card(source.manifest).encode()
    known = (source.manifest.files.get(CARD_NAME), sha256_of_bytes(card))
    if was_pulled and here.is_file() and sha256_of_file(here) not in known:
        logger.warning("%s is another than at the source, and stays; delete it to have that one", here)
    else:
        write_atomically(here, card)


def _cut(source: Source, shard: Shard, rows: int) -> Shard:
    """The first rows of a shard, written under its name."""
    origin, form = source.origin, source.manifest.row_format
    data = origin.read(shard.path)
    where = f"{source.name}/{shard.path}"
    if (got := sha256_of_bytes(data)) != shard.sha256:
        raise DamagedShardError(
            f"{where}: damaged: expected sha256 {shard.sha256[:16]}…, got {got[:16]}…", next_step=COPY_AGAIN
        )
    write_atomically(origin.local / shard.path, data, aside=origin.local)
    table = pa.concat_tables(tables_of(checked_bytes(origin.local, shard, form), where)).slice(0, rows)
    keep: dict[str, Any] = source.manifest.keep
    data, entry = write_table(table, form, Storage(max_kl=keep.get("max_kl", 0.0)), shard.path)
    write_atomically(origin.local / shard.path, memoryview(data), aside=origin.local)
    return entry


def _count(done: Pulled, fetched: bool) -> None:
    done.fetched, done.kept = done.fetched + fetched, done.kept + (not fetched)


def _told(done: Pulled, output: Path) -> Pulled:
    dataset = LogitDataset.open(output)
    done.identity, done.rows = dataset.identity(), dataset.manifest.total("rows")
    done.shards = len(dataset.manifest.shards)
    return done


def num_files(manifest: Manifest, part: Part | None) -> int:
    return len([path for path in manifest.files if path != CARD_NAME]) + len(
        manifest.shards if part is None else part.shards
    )


def part_of(manifest: Manifest, shards: str | None, share: float | None) -> Part | None:
    """What two options say of which one at most is given; None for the whole.

    Raises:
        ConfigError: see `some_shards` and `a_share`; both are given.
    """
    if shards is not None and share is not None:
        raise ConfigError("--shards and --share are both given", next_step="give one of them")
    if shards is not None:
        return some_shards(manifest, shards)
    return None if share is None else a_share(manifest, share)
