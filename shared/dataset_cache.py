"""Datasets at URLs: a file is fetched when it is needed, compared with its digest, and kept on this machine.

What is kept is compared again whenever it is asked for, and fetched again where it is damaged.  Several processes may
share a cache: each file is fetched by one of them while the others wait, and appears whole or not at all.

Layout: `<cache>/<sha256 of the manifest>/`, below which a dataset lies as it does anywhere.  So a dataset that was made
anew at the same URL is another one.  Nothing is ever removed; a folder that is no longer wanted can be deleted.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shared.errors import DamagedShardError, LogitferryError, OutputError
from shared.files import claim_folder, sha256_of_bytes, sha256_of_file, write_atomically
from shared.folders import Folder
from shared.manifest import MANIFEST_NAME

logger = logging.getLogger("logitferry")

LOCKS_FOLDER = ".locks"
COPY_AGAIN = "copy it again to there from where the dataset was made, or logit-shards repair a local copy"


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/logitferry/datasets`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitferry" / "datasets"


@dataclass(frozen=True)
class Origin:
    """A dataset elsewhere, and the folder on this machine that its files come to."""

    remote: Folder
    local: Path

    @staticmethod
    def of(remote: Folder, manifest: bytes, cache: Path | None) -> "Origin":
        """Begin to keep the dataset with this manifest.

        Raises:
            ConfigError, OutputError: the cache cannot be written to.
        """
        origin = Origin(remote, (cache or default_cache()) / sha256_of_bytes(manifest))
        claim_folder(origin.local, [MANIFEST_NAME, LOCKS_FOLDER])
        origin._keep(MANIFEST_NAME, sha256_of_bytes(manifest), manifest)
        return origin

    def provide(self, path: str, sha256: str) -> bool:
        """See to it that a file lies in the local folder with this digest.  Returns whether it had to be fetched.

        Raises:
            DamagedShardError: it is not there, or is another file, at the URL as well.
            OutputError: the URL cannot be reached, or there is no room.
        """
        return self._keep(path, sha256, None)

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """A file at the URL, to read parts of.

        Raises:
            DamagedShardError: it is not there.
        """
        try:
            with self.remote.opened(path) as file:
                yield file
        except FileNotFoundError:
            raise self._missing(path) from None

    def _keep(self, path: str, sha256: str, data: bytes | None) -> bool:
        try:
            return self._keep_in_turn(path, sha256, data)
        except LogitferryError:
            raise
        except OSError as error:
            raise OutputError(
                f"cache {self.local / path}: {error.strerror or error}", next_step="give another `cache`"
            ) from error

    def _keep_in_turn(self, path: str, sha256: str, data: bytes | None) -> bool:
        local = self.local / path
        if _is(local, sha256):
            return False
        with self._locked(path):
            if _is(local, sha256):  # another process has seen to it
                return False
            if local.exists():
                logger.warning("%s is damaged and is fetched again", local)
            data = self.read(path) if data is None else data
            if (got := sha256_of_bytes(data)) != sha256:
                raise DamagedShardError(
                    f"{self.remote.name}/{path}: damaged: expected sha256 {sha256[:16]}…, got {got[:16]}…",
                    next_step=COPY_AGAIN,
                )
            write_atomically(local, data)
            return True

    def read(self, path: str) -> bytes:
        """A file at the URL, as it is there.

        Raises:
            DamagedShardError: it is not there.
            OutputError: the URL cannot be reached.
        """
        try:
            return self.remote.read(path)
        except FileNotFoundError:
            raise self._missing(path) from None

    def _missing(self, path: str) -> DamagedShardError:
        return DamagedShardError(f"{self.remote.name}/{path}: is missing", next_step=COPY_AGAIN)

    @contextmanager
    def _locked(self, path: str) -> Iterator[None]:
        lock = self.local / LOCKS_FOLDER / f"{path.replace('/', '-')}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # which ends with the process, however that ends
            yield


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of_file(path) == sha256
