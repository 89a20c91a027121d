"""Progress of long work: a bar with rate and ETA on a terminal, one line every 30 s elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_INTERVAL_S = 30.0


class Ticker:
    """Counts units of work done and shows them."""

    def __init__(self, label: str, total: int | None, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self._label, self._total, self._unit, self._shown = label, total, unit, shown
        self._done = self._done_before = done
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: Progress | None = None

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Record finished work; `note` is a few words on how it goes."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, note=note)
        elif self._shown and (now := time.monotonic()) - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = now
            rate = (self._done - self._done_before) / (now - self._start_s)
            line = f"{self._label}: {self._done}{self._of_total(rate)}"
            print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201

    def _of_total(self, rate: float) -> str:
        if self._total is None:
            return f" {self._unit}, {rate:.3g}/s"
        left_s = (self._total - self._done) / rate if rate else float("inf")
        return f"/{self._total} {self._unit}, {rate:.3g}/s, {left_s:.0f} s left"

    def _show_bar(self) -> Progress:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self._unit),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.add_task(self._label, total=self._total, completed=self._done, note="")
        return self._bar


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


@contextmanager
def progress(label: str, total: int | None, unit: str, *, done: int = 0, shown: bool = True) -> Iterator[Ticker]:
    """A ticker for the length of a `with` block; `total` is None where nobody knows it beforehand.

    `done` was done before, and has no part in the rate.
    """
    ticker = Ticker(label, total, unit, done=done, shown=shown)
    if shown and sys.stderr.isatty():
        with ticker._show_bar():
            yield ticker
    else:
        yield ticker
