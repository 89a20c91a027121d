"""A folder of whole files, on this machine or at an fsspec URL; several processes may write to it.

A file is wholly there or not there.  On this machine: temporary name, fsync, rename, fsync of the folder.  Object
stores have no rename and need none: an object shows when all of it has arrived, an upload that was cut never does.
Other remote file systems (sftp, hdfs) may show a part of a file until it is written again, so what must be whole is
told by a digest that is written after it.

Paths are relative to the folder, with `/`.
"""

import os
import posixpath
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from shared.errors import ConfigError, LogitferryError, OutputError
from shared.files import (
    PROBE,
    TEMPORARY_PREFIX,
    claim_folder,
    sha256_of_file,
    sha256_of_stream,
    sync_folder,
    write_atomically,
)
from shared.masking import masked, require_no_secret

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "obs", "cos", "r2", "memory"}
"""Which have no folders to make; making one of their buckets is nothing to do in passing."""
PATTERN_CHARACTERS = "*?["
"""With which fsspec's file systems would mean other folders as well."""


class Folder(Protocol):
    """Raises OutputError for what cannot be reached, read or written, besides what each method says."""

    name: str
    """What people call it: a path or URL."""

    def claim(self, ours: Sequence[str]) -> None:
        """Make it, or take one that holds one of `ours`; found out before any work, not after it.

        Raises:
            ConfigError: it holds other things.
        """
        ...

    def files(self, below: str = "") -> list[str]:
        """Paths of all files in a folder inside it; none where there is no such folder."""
        ...

    def exists(self, path: str) -> bool:
        """Is there such a file?"""
        ...

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def opened(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A file to read parts of; raises FileNotFoundError."""
        ...

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        """Side by side where that is quicker; raises FileNotFoundError."""
        ...

    def sha256(self, path: str) -> str | None:
        """None where there is no such file."""
        ...

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Wholly, or not at all; what was there before stays until then."""
        ...

    def remove(self, path: str) -> None:
        """A file, or a folder with all that is in it; nothing where there is neither."""
        ...

    def sweep(self, names: str, *, older_than_s: float) -> None:
        """Remove what writers who were killed have left of files with such names."""
        ...


def open_folder(url: str) -> Folder:
    """The folder at a path or fsspec URL, which need not exist yet.

    Raises:
        ConfigError: nothing is known of such URLs, the package that does is not installed, or a secret is in it.
    """
    require_no_secret(url)
    if "://" not in url and "::" not in url:
        return LocalFolder(Path(url))
    with told(url):
        fs, path = url_to_fs(url)
    if not isinstance(fs, LocalFileSystem) and set(url) & set(PATTERN_CHARACTERS):
        raise ConfigError(f"{url}: has one of {PATTERN_CHARACTERS} in it", next_step="give the folder a plain name")
    return LocalFolder(Path(path)) if isinstance(fs, LocalFileSystem) else RemoteFolder(fs, path, url)


def local_output(url: str) -> Path:
    """The folder of this machine that a path or file:// URL names, for what is written to no other place.

    Raises:
        ConfigError: it is elsewhere.
    """
    if not url:
        raise ConfigError("the output has no name", next_step="name a folder, or . for the one that you are in")
    folder = open_folder(url)
    if not isinstance(folder, LocalFolder):
        raise ConfigError(
            f"{folder.name}: is not on this machine, where the new dataset is made",
            next_step=f"give a folder here, then: logit-shards push FOLDER {folder.name}",
        )
    return folder.path


class LocalFolder:
    """See `Folder`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def claim(self, ours: Sequence[str]) -> None:
        claim_folder(self.path, ours)

    def files(self, below: str = "") -> list[str]:
        # Not Path.rglob, which is upset by others who remove what it goes through.
        found = [Path(folder, name) for folder, _, names in os.walk(self.path / below) for name in names]
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def exists(self, path: str) -> bool:
        return (self.path / path).is_file()

    def read(self, path: str) -> bytes:
        with self._told(path):
            return (self.path / path).read_bytes()

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        with self._told(path), (self.path / path).open("rb") as file:
            yield file

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        return [self.read(path) for path in paths]

    def sha256(self, path: str) -> str | None:
        with self._told(path), suppress(FileNotFoundError):
            return sha256_of_file(self.path / path)
        return None

    def write(self, path: str, data: bytes | memoryview) -> None:
        write_atomically(self.path / path, data, aside=self.path)  # where nobody looks for data

    def remove(self, path: str) -> None:
        target = self.path / path
        with self._told(path):
            for folder, _, names in os.walk(target, topdown=False):  # others may remove the same
                for name in names:
                    Path(folder, name).unlink(missing_ok=True)
                with suppress(OSError):  # somebody has written to it since
                    Path(folder).rmdir()
            with suppress(IsADirectoryError):
                target.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                sync_folder(target.parent)

    def sweep(self, names: str, *, older_than_s: float) -> None:
        with self._told(TEMPORARY_PREFIX):
            for path in self.path.glob(f"{TEMPORARY_PREFIX}{names}"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime >= older_than_s:
                        path.unlink()

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, LogitferryError):
            raise
        except NotADirectoryError:
            raise ConfigError(f"{self.path} is a file, not a folder", next_step="check the path") from None
        except OSError as error:
            raise OutputError(
                f"{self.path / path}: {error.strerror}", next_step="mend the folder's permissions"
            ) from error


class RemoteFolder:
    """See `Folder`; `root` is what the file system calls the folder."""

    def __init__(self, fs: AbstractFileSystem, root: str, url: str) -> None:
        self._fs: Any = fs
        self._root = root.rstrip("/")
        self.name = url.rstrip("/")
        self._made: set[str] = set()
        protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
        self._is_object_store = not OBJECT_STORES.isdisjoint(protocols)

    def claim(self, ours: Sequence[str]) -> None:
        with told(self.name):
            self._fs.invalidate_cache()
            names: set[str] = set()
            with suppress(FileNotFoundError):
                names = {posixpath.basename(path.rstrip("/")) for path in self._fs.ls(self._root, detail=False)}
        tried = {name for name in names if name.startswith(PROBE)}  # by somebody who was killed then
        for name in tried:
            self.remove(name)
        if names - tried and not names & set(ours):
            raise ConfigError(
                f"output {self.name} is not empty and holds none of {', '.join(ours)}: it is not ours to write to",
                next_step="give another `output`, or empty this one",
            )
        probe = f"{PROBE}{uuid.uuid4().hex}"  # may it be written?
        self.write(probe, b"")
        self.remove(probe)

    def files(self, below: str = "") -> list[str]:
        with told(self._where(below)):
            self._fs.invalidate_cache()  # others write here as well
            with suppress(FileNotFoundError):
                return sorted(posixpath.relpath(path, self._root) for path in self._fs.find(self._at(below)))
        return []

    def exists(self, path: str) -> bool:
        with told(self._where(path)):
            self._fs.invalidate_cache()
            return self._fs.exists(self._at(path))

    def read(self, path: str) -> bytes:
        with told(self._where(path)):
            return self._fs.cat_file(self._at(path))

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        with told(self._where(path)), cast(BinaryIO, self._fs.open(self._at(path), "rb")) as file:
            yield file

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        whole = [None] * len(paths)
        with told(self.name):
            found = self._fs.cat_ranges([self._at(path) for path in paths], whole, whole, on_error="raise")
            for each in found:
                if isinstance(each, BaseException):  # earlier releases of fsspec give back what they should raise
                    raise each
            return found

    def sha256(self, path: str) -> str | None:
        with told(self._where(path)), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            with cast(BinaryIO, self._fs.open(self._at(path), "rb", cache_type="readahead")) as file:
                return sha256_of_stream(file)
        return None

    def write(self, path: str, data: bytes | memoryview) -> None:
        try:
            with told(self._where(path)):
                if not self._is_object_store and (parent := posixpath.dirname(self._at(path))) not in self._made:
                    self._fs.makedirs(parent, exist_ok=True)
                    self._made.add(parent)
                self._fs.pipe_file(self._at(path), bytes(data))
        except FileNotFoundError as error:  # of the bucket
            raise OutputError(
                f"{self._where(path)} cannot be written: {masked(str(error))}",
                next_step="make the bucket or folder it lies in",
            ) from None

    def remove(self, path: str) -> None:
        with told(self._where(path)):
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self._fs.rm(self._at(path), recursive=True)

    def sweep(self, names: str, *, older_than_s: float) -> None:
        """Nothing is ever to be seen of an upload that was cut; the store's own rules remove its parts."""

    def _at(self, path: str) -> str:
        return posixpath.join(self._root, path) if path else self._root

    def _where(self, path: str) -> str:
        return f"{self.name}/{path}"


@contextmanager
def told(where: str) -> Iterator[None]:
    """File systems raise all kinds of exceptions for what they cannot reach; ours says where."""
    try:
        yield
    except (FileNotFoundError, LogitferryError, MemoryError):
        raise
    except ImportError as error:
        raise ConfigError(f"{where}: {error}", next_step="pip install 'logitferry[hub]'") from error
    except ValueError as error:  # a protocol that nobody knows, credentials that are none
        raise ConfigError(f"{where}: {masked(str(error))}", next_step="check the URL, and your access") from error
    except Exception as error:
        causes = [error, error.__cause__] if error.__cause__ else [error]  # such as what the Hub said to an upload
        reason = ": ".join(masked(str(each)).strip() or type(each).__name__ for each in causes)
        raise OutputError(
            f"{where} cannot be reached: {reason}", next_step="check your access, then run the same command again"
        ) from error
