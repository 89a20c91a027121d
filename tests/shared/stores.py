"""Where tests keep datasets: the files of a folder, and an object store in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def memory_store(at: str, folder: Path | None = None) -> Iterator[Any]:
    """What `memory://` URLs mean, with the files of `folder` at `at`; empty before and after."""
    fs: Any = fsspec.filesystem("memory")
    fs.store.clear()
    for path, data in files_of(folder).items() if folder else ():
        fs.pipe_file(f"/{at}/{path}", data)
    try:
        yield fs
    finally:
        fs.store.clear()
