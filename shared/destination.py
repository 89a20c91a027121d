"""Where a dataset is pushed to: a folder here or at an fsspec URL (see `shared.hub` for the Hugging Face Hub).

A destination is asked for the digest of what lies there, so that nothing is sent twice and what arrived is compared.
A folder can only say by being read back: each file costs a read, once when it was sent and once when it is found there.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from shared.card import KEPT_BELOW
from shared.dataset import CARD_NAME, DATA_FOLDER, TOKENIZER_FOLDER
from shared.errors import ConfigError, DamagedDataError, MismatchError
from shared.files import require_apart, sha256_of_bytes, why_no_file
from shared.folders import Folder, LocalFolder
from shared.manifest import MANIFEST_NAME, SHARD_PATH, UNSCORABLE_NAME, WORK_FOLDER

SEND_AGAIN = "run the same command again: what arrived whole is not sent again"


class Destination(Protocol):
    """Raises OutputError for what cannot be reached or written."""

    name: str
    """What people call it: a path or URL."""

    def claim(self, folder: Path) -> None:
        """Make it ready for the dataset in `folder`.

        Raises:
            ConfigError: it cannot be one, such as a folder of other things.
        """
        ...

    def paths(self) -> set[str]:
        """All files there, but those of which a part of the path begins with a dot."""
        ...

    def has_dump(self) -> bool:
        """Does a dump write there?"""
        ...

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def holds(self, path: str, data: bytes) -> bool:
        """Does just this file lie there?"""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Write a file, over what is there; seen at once, or when it is settled.

        Raises:
            DamagedDataError: what arrived is something else.
            MismatchError: somebody else has written there since it was looked at.
        """
        ...

    def remove(self, paths: Collection[str]) -> None:
        """Take files away; seen at once, or when it is settled."""
        ...

    def settle(self) -> None:
        """All that was put is there now.

        Raises:
            DamagedDataError: something else arrived.
        """
        ...


class FolderDestination:
    """See `Destination`."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self.name = folder, folder.name

    def claim(self, folder: Path) -> None:
        if isinstance(self._folder, LocalFolder):
            require_apart(folder, self._folder.path)
            self._folder.claim([MANIFEST_NAME, DATA_FOLDER, TOKENIZER_FOLDER])
            paths = self.paths()
            others = sorted(path for path in paths if path != CARD_NAME and not is_of_a_dataset(path))
            if others and MANIFEST_NAME not in paths:
                raise ConfigError(
                    f"{self.name} holds {others[0]}, which is no part of a dataset", next_step="give another folder"
                )
        self._require_no_other_readme(folder)

    def _require_no_other_readme(self, folder: Path) -> None:
        """In an object store nothing else says that a project lies there, whose README.md would be lost."""
        if self._folder.exists(CARD_NAME) and not self._folder.exists(MANIFEST_NAME):
            there, ours = self.read(CARD_NAME), folder / CARD_NAME
            is_ours = not why_no_file(folder, ours) and ours.read_bytes() == there
            is_begun = any(re.match(SHARD_PATH, path) for path in self.paths())  # a push that was interrupted
            if not is_ours and not is_begun and KEPT_BELOW.encode() not in there:
                raise ConfigError(
                    f"{self.name}/{CARD_NAME} is no card of a dataset, and would be written over",
                    next_step="give another folder, or move that file",
                )

    def paths(self) -> set[str]:
        return {path for path in self._folder.files() if not is_hidden(path)}

    def has_dump(self) -> bool:
        return bool(self._folder.files(WORK_FOLDER))

    def read(self, path: str) -> bytes:
        return self._folder.read(path)

    def holds(self, path: str, data: bytes) -> bool:
        return self._folder.sha256(path) == sha256_of_bytes(data)

    def put(self, path: str, data: bytes) -> None:
        if path == MANIFEST_NAME and self._folder.sha256(path) not in (None, sha256_of_bytes(data)):
            raise MismatchError(
                f"{self.name}: another dataset was pushed there at the same time, and neither is whole now",
                next_step="push the one that is to be there again, with --replace; it sends what is missing",
            )
        self._folder.write(path, data)
        if not self.holds(path, data):
            raise DamagedDataError(f"{self.name}/{path}: what lies there is not what was sent", next_step=SEND_AGAIN)

    def remove(self, paths: Collection[str]) -> None:
        for path in paths:
            self._folder.remove(path)

    def settle(self) -> None:
        pass


def is_of_a_dataset(path: str) -> bool:
    """Is it a file such as datasets have, but manifest and card, whose names others use as well?"""
    in_tokenizer = path.startswith(f"{TOKENIZER_FOLDER}/")
    return in_tokenizer or path == UNSCORABLE_NAME or re.match(SHARD_PATH, path) is not None


def is_hidden(path: str) -> bool:
    """Is it no part of a dataset, such as .git and what a Hub keeps for itself?"""
    return any(part.startswith(".") for part in path.split("/"))
