"""The log of a run: one JSON object on each line, one line for each step and each look at the held-out rows.

A run that goes on from a checkpoint takes away what was logged of steps behind it, since it does these again: whatever
happened, the log of a finished run has every step once, in order.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from shared.files import write_atomically
from student_train.sinks import Sink, numbers_of


class RunLog:
    """Writes the log of one run, in a `with` block; of several ranks only the first one does."""

    def __init__(
        self, path: Path, *, after: int | None, seconds: float, writes: bool, sinks: Sequence[Sink] = ()
    ) -> None:
        """`after` is the step that was done last, and None of a new run; `seconds` is how long it had taken."""
        self._path, self._writes, self._sinks = path, writes, sinks
        self._begin_s = time.monotonic() - seconds
        self._file: IO[str] | None = None
        kept = [] if after is None else [entry for entry in _entries(path) if entry["step"] <= after]
        self.evaluated = {entry["step"]: entry["held_out"] for entry in kept if "held_out" in entry}
        """What has been found of the held-out rows, by step."""
        if writes:
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def __enter__(self) -> "RunLog":
        self._file = self._path.open("a", encoding="utf-8") if self._writes else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()

    @property
    def seconds(self) -> float:
        """Since the run began, without the time that it lay still."""
        return time.monotonic() - self._begin_s

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line."""
        entry = _with_null(entry) | {"elapsed_s": round(self.seconds, 3)}
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.write(entry["step"], numbers_of(entry))

    def sync(self) -> None:
        """Make what was written durable."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _with_null(value: Any) -> Any:
    """With None for what is no number, which JSON has no word for."""
    if isinstance(value, dict):
        return {name: _with_null(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entries(path: Path) -> list[dict[str, Any]]:
    """Those that are whole; a line that was being written when the process was killed is not."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
