"""Work done in a forked process that is killed with SIGKILL at a numbered step of what it does to the disk.

A step lies before and after every write of data (and in the middle of it), fsync, rename and removal of all that
`shared.files` and `shared.folders` do.  A step is named by what is done and to which file, so that a test can say what
it has covered.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from shared.files import TEMPORARY_PREFIX


class Steps:
    """Counts steps; the one numbered `last` is not survived."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.names = last, []

    def reach(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        self.reach(f"before {what}")
        yield
        self.reach(f"after {what}")


def _plain(path: Path) -> str:
    """A file's name, without what makes temporary ones unique."""
    return path.name.removeprefix(TEMPORARY_PREFIX).rsplit(".", 1)[0] if TEMPORARY_PREFIX in path.name else path.name


@contextmanager
def traced(steps: Steps) -> Iterator[None]:
    """All that is done to the disk within the block goes by `steps`."""
    opened, fsync, replace, unlink, rmdir = Path.open, os.fsync, Path.replace, Path.unlink, Path.rmdir

    class Written:
        """A file whose writes reach the disk in two halves."""

        def __init__(self, path: Path, file: Any) -> None:
            self._path, self._file = path, file

        def __enter__(self) -> "Written":
            return self

        def __exit__(self, *_: Any) -> None:
            self._file.close()

        def write(self, data: Any) -> None:
            half = len(data) // 2
            with steps.around(f"write {_plain(self._path)}"):
                self._file.write(data[:half])
                self._file.flush()
                steps.reach(f"within write {_plain(self._path)}")
                self._file.write(data[half:])
                self._file.flush()

        def flush(self) -> None:
            self._file.flush()

        def fileno(self) -> int:
            return self._file.fileno()

    def open_traced(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = opened(self, mode, *arguments, **options)
        return Written(self, file) if mode == "wb" and self.name.startswith(TEMPORARY_PREFIX) else file

    def fsync_traced(descriptor: int) -> None:
        with steps.around(f"fsync {_plain(Path(os.readlink(f'/proc/self/fd/{descriptor}')))}"):
            fsync(descriptor)

    def replace_traced(self: Path, target: Path) -> Path:
        with steps.around(f"rename {Path(target).name}"):
            return replace(self, target)

    def unlink_traced(self: Path, **options: Any) -> None:
        with steps.around(f"remove {_plain(self)}"):
            unlink(self, **options)

    def rmdir_traced(self: Path) -> None:
        with steps.around(f"remove {self.name}"):
            rmdir(self)

    Path.open, os.fsync, Path.replace = open_traced, fsync_traced, replace_traced  # type: ignore[method-assign]
    Path.unlink, Path.rmdir = unlink_traced, rmdir_traced  # type: ignore[method-assign]
    try:
        yield
    finally:
        Path.open, os.fsync, Path.replace, Path.unlink, Path.rmdir = opened, fsync, replace, unlink, rmdir


Tracing = Callable[[Steps], AbstractContextManager[None]]


def killed_at(step: int, work: Callable[[], Any], tracing: Tracing = traced) -> bool:
    """Do the work in a forked process; was it killed at this step (or did it end before it)?"""
    pid = os.fork()
    if pid == 0:
        try:
            with tracing(Steps(step)):
                work()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"ended with {status}, neither killed nor done"
    return status == signal.SIGKILL
