"""Files that are either wholly there or not there: temporary name, fsync, rename, fsync of the folder."""

import difflib
import fcntl
import hashlib
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shared.errors import ConfigError, LogitferryError, OutputError

HASH_BLOCK_BYTES = 1 << 22
TEMPORARY_PREFIX = ".writing-"
PROBE = ".probe-"
NOBODYS = (TEMPORARY_PREFIX, PROBE, ".doctor-", ".nfs")
"""Names that say nothing of whose a folder is: of what is tried or was left behind."""


def claim_folder(folder: Path, ours: Sequence[str]) -> None:
    """Make an output folder, or take one that holds one of `ours`; found out before any work, not after it.

    Raises:
        ConfigError: the folder holds other things, which would be overwritten.
        OutputError: it cannot be made or written.
    """
    try:
        _make_folder(folder)
        taken = any(not path.name.startswith(NOBODYS) for path in folder.iterdir())
        if taken and not any((folder / name).exists() for name in ours):
            what = f"is not empty and holds none of {', '.join(ours)}" if ours else "is not empty"
            raise ConfigError(
                f"output {folder} {what}: it is not ours to write to",
                next_step="give another `output`, or empty this one",
            )
        with tempfile.TemporaryFile(dir=folder, prefix=PROBE):  # which has a name where the file system knows no other
            pass
    except FileExistsError:
        raise ConfigError(f"output {folder} is a file, not a folder", next_step="give another `output`") from None
    except OSError as error:
        raise OutputError(
            f"output {folder} cannot be written: {error.strerror}", next_step="mend the folder's permissions or space"
        ) from None


def nearest_folder(name: str | Path) -> str | None:
    """Advice, where a name may be that of a folder with a slip in it."""
    path = Path(name).expanduser()
    folders: list[str] = []
    with suppress(OSError):  # such as another's, who lets nobody look in
        folders = [each.name for each in path.parent.iterdir() if each.is_dir()]
    near = difflib.get_close_matches(path.name, folders, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else None


def require_apart(one: Path, other: Path) -> None:
    """Raises ConfigError where one of two folders lies in the other, whose files it would be among."""
    outer, inner = sorted(
        (Path(os.path.realpath(one)), Path(os.path.realpath(other))), key=lambda path: len(path.parts)
    )
    if inner != outer and inner.is_relative_to(outer):
        raise ConfigError(f"{inner} lies in {outer}, of which it would be a part", next_step="give a folder beside it")


def write_atomically(path: Path, data: bytes | memoryview, *, aside: Path | None = None) -> None:
    """Write `data` so that `path` never shows a part of it, also across a power cut.

    Raises OutputError where the disk is full or not writable; what was there before stays.

    A crash leaves at most a file with TEMPORARY_PREFIX beside `path`, or in the folder `aside` of the same file system;
    nothing reads those.
    """
    # Writers may be processes of several machines.
    temporary = (aside or path.parent) / f"{TEMPORARY_PREFIX}{path.name}.{uuid.uuid4().hex}"
    try:
        _make_folder(path.parent)
        _make_folder(temporary.parent)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        _forget(temporary)
        if isinstance(error, OSError):
            raise OutputError(
                f"{path} cannot be written: {error.strerror}", next_step="make room, then run the same command again"
            ) from error
        raise
    sync_folder(path.parent)


def _forget(temporary: Path) -> None:
    """A read-only file system refuses to remove even what is not there, and that is not what went wrong."""
    with suppress(OSError):
        temporary.unlink()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps another process of this machine out of an output folder.

    On a file system that hosts share, its own decides: NFS locks no folder, and everybody is let in.

    Raises:
        ConfigError: another process is at work in it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that has no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"output {folder}: another process is writing to it",
                    next_step="wait for it or stop it, then run the same command again; or give another `output`",
                ) from None
        yield
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Make a folder whose name is durable, and those above it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # one may write to a folder that one may not read
            sync_folder(folder.parent)


def sync_tree(folder: Path) -> None:
    """Make every file below `folder`, written by someone else, durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lies_within(folder: Path, path: Path) -> bool:
    """Is `path`, all links followed, inside `folder`, or where the Hugging Face cache keeps what is in it?

    There a snapshot of a repository is a folder of links: `snapshots/<commit>/data/x` to `blobs/<digest>` beside
    `snapshots`.  No other place outside is let through, so that a dataset from elsewhere can't have us read any file.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))  # which loops of links don't hurt
    is_snapshot = home.parent.name == "snapshots"
    return real.is_relative_to(home) or (is_snapshot and real.parent == home.parent.parent / "blobs")


def why_no_file(folder: Path, path: Path) -> str | None:
    """What keeps `path` from being a file inside `folder`; None where nothing does.  Opens nothing that may block."""
    if not lies_within(folder, path):
        return "leads outside the dataset"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if stat.S_ISREG(mode) else "is a folder, pipe or device, not a file"


def sha256_of_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of_stream(file)


def sha256_of_stream(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(HASH_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """As `write_atomically`, of a file too large to be held: it gets its name when the block ends well, and else goes.

    Raises:
        OutputError: the disk is full or not writable.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}.{uuid.uuid4().hex}"
    try:
        _make_folder(path.parent)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        _forget(temporary)
        if isinstance(error, OSError) and not isinstance(error, LogitferryError):
            raise OutputError(
                f"{path} cannot be written: {error.strerror}", next_step="make room, then run the same command again"
            ) from error
        raise
    sync_folder(path.parent)
