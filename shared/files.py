"""Files that are either wholly there or not there: temporary name, fsync, rename, fsync of the folder."""

import hashlib
import os
from pathlib import Path

HASH_BLOCK_BYTES = 1 << 22
TEMPORARY_PREFIX = ".writing-"


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` never shows a part of it, also across a power cut.

    A crash leaves at most a file with TEMPORARY_PREFIX beside `path`; nothing reads those.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
