"""A sealed dataset to a folder, an object store or the Hub, so that nothing is sent twice and nothing half-sent is
taken for a dataset.

Each file is compared with its digest here before it is sent, and there after it was.  Shards go first, the manifest
last of all; where another dataset is replaced, its manifest goes away first.  All that a second try needs to know is
what lies there: interrupted at any point, run it again.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from shared.dataset import CARD_NAME, COPY_TOKENIZER, LogitDataset
from shared.destination import Destination, FolderDestination, is_of_a_dataset
from shared.errors import DamagedDataError, LogitferryError, MismatchError
from shared.files import sha256_of_bytes, why_no_file
from shared.folders import open_folder
from shared.hub import HubDestination
from shared.manifest import MANIFEST_NAME, parse_manifest
from shared.shard_reader import REPAIR

REPLACE = "another destination, or the same command with --replace, which takes away what lies there"

WRITE_CARD = "logit-shards card {} writes it anew"

logger = logging.getLogger("logitferry")

OnFile = Callable[[], None]


@dataclass(kw_only=True)
class Pushed:
    """What was done."""

    destination: str
    identity: str
    sent: int = 0
    """Files."""
    sent_bytes: int = 0
    kept: int = 0
    """Files that lay there already."""
    removed: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def open_destination(url: str, *, public: bool = False) -> Destination:
    """What is at a path or URL; a repository of the Hub is made where there is none, private unless `public`.

    Raises:
        ConfigError: nothing is known of such URLs, or a package is not installed.
        MismatchError: the repository is public, and nobody said that it may be.
        OutputError: it cannot be reached.
    """
    if url.startswith("hf://"):
        return HubDestination(url, public=public)
    return FolderDestination(open_folder(url))


def push(
    dataset: LogitDataset, destination: Destination, *, replace: bool = False, on_file: OnFile = lambda: None
) -> Pushed:
    """Bring the dataset there; `on_file` is called after each of its files.

    Raises:
        ConfigError: no dataset can be brought there; see `Destination.claim`.
        DamagedDataError: a file is not what the manifest says, here, or there after it was sent.
        MismatchError: another dataset is there.
        OutputError: it cannot be reached or written.
    """
    manifest_data = (dataset.folder / MANIFEST_NAME).read_bytes()
    done = Pushed(destination=destination.name, identity=sha256_of_bytes(manifest_data))
    destination.claim(dataset.folder)
    there = destination.paths()
    is_same = MANIFEST_NAME in there and destination.read(MANIFEST_NAME) == manifest_data
    paths = _paths(dataset)
    whole = {path for path in paths if path in there and destination.holds(path, _checked(dataset, path))}
    stale: set[str] = set()
    if not is_same:
        stale = _what_is_in_the_way(dataset, destination, there - whole)
        if stale and not replace:
            raise MismatchError(
                f"{destination.name}: {_said(stale)}, which is no part of this dataset", next_step=REPLACE
            )
        if MANIFEST_NAME in there:
            destination.remove([MANIFEST_NAME])  # from now on it is no dataset
    for path in paths:
        if path in whole:
            done.kept += 1
        else:
            if path == CARD_NAME and path in there and not replace:
                logger.warning("%s/%s was another, and is replaced by the one here", destination.name, path)
            destination.put(path, data := _checked(dataset, path))
            done.sent, done.sent_bytes = done.sent + 1, done.sent_bytes + len(data)
        on_file()
    gone = sorted(stale - set(paths) - {MANIFEST_NAME})
    destination.remove(gone)
    done.removed = len(gone)
    if not is_same:
        destination.put(MANIFEST_NAME, manifest_data)
        done.sent, done.sent_bytes = done.sent + 1, done.sent_bytes + len(manifest_data)
    destination.settle()
    on_file()
    return done


def num_files(dataset: LogitDataset) -> int:
    return len(_paths(dataset)) + 1


def _what_is_in_the_way(dataset: LogitDataset, destination: Destination, there: set[str]) -> set[str]:
    """Paths of what another dataset has left or holds there, also half of one; the card is nobody's.

    `there` is what lies there and is no file of ours.

    Raises:
        MismatchError: a dump writes there.
    """
    if destination.has_dump():
        raise MismatchError(f"{destination.name}: a dump writes there", next_step="give another destination")
    found = {path for path in there if path in _paths(dataset) or is_of_a_dataset(path)}
    if MANIFEST_NAME in there:
        found.add(MANIFEST_NAME)
        try:
            other = parse_manifest(destination.read(MANIFEST_NAME), f"{destination.name}/{MANIFEST_NAME}")
            found |= there & {shard.path for shard in other.shards} | there & set(other.files)
        except LogitferryError:
            pass
    return found - {CARD_NAME}


def _paths(dataset: LogitDataset) -> dict[str, str]:
    """The digest of every file but the manifest, shards first."""
    manifest = dataset.manifest
    return {shard.path: shard.sha256 for shard in manifest.shards} | manifest.files


def _checked(dataset: LogitDataset, path: str) -> bytes:
    """The bytes of a file that are what the manifest says; of the card, whatever they are."""
    file = dataset.folder / path
    is_shard = path.startswith("data/")
    step = COPY_TOKENIZER if "/" in path and not is_shard else REPAIR.format(dataset.folder)
    step = WRITE_CARD.format(dataset.folder) if path == CARD_NAME else step
    if fault := why_no_file(dataset.folder, file):
        raise DamagedDataError(f"{file}: {fault}", next_step=step)
    data = file.read_bytes()
    digest = sha256_of_bytes(data)
    if path != CARD_NAME and digest != (expected := _paths(dataset)[path]):
        raise DamagedDataError(f"{file}: damaged: expected sha256 {expected[:16]}…, got {digest[:16]}…", next_step=step)
    return data


def _said(paths: set[str]) -> str:
    if MANIFEST_NAME in paths:
        return "another dataset is there"
    return f"{min(paths)}{f' and {len(paths) - 1} more files' if len(paths) > 1 else ''} is there"
