"""Signals that wait until it is safe to stop.

`shared.cli` turns SIGINT, SIGTERM and SIGALRM into KeyboardInterrupt wherever the program is.  In the middle of an
optimizer's step that would leave half of it done, so a trainer takes them itself, asks between steps whether one came,
and hands it on when what it had is written.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class _Asked(BaseException):
    """Breaks off a wait."""


class Interruption:
    """What came of the signals that are held back."""

    def __init__(self, earlier: Mapping[int, Any] | None = None) -> None:
        self._earlier = earlier or {}
        self._came: tuple[int, FrameType | None] | None = None
        self._may_break = False

    @property
    def came(self) -> bool:
        """Has anybody asked to stop?"""
        return self._came is not None

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None, and `work` broken off, where somebody asks to stop.  For what changes nothing."""
        if self.came:
            return None
        try:
            try:
                self._may_break = True
                return work()
            finally:
                self._may_break = False
        except _Asked:
            return None

    def hand_on(self) -> None:
        """Do with the signal what would have been done; nothing where none came.

        Raises:
            KeyboardInterrupt: under `shared.cli`.
        """
        if self._came is not None:
            handler = self._earlier[self._came[0]]
            if callable(handler):
                handler(*self._came)
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        again = self.came and number == signal.SIGINT
        self._came = self._came or (number, frame)
        if again:  # Ctrl-C twice: at once, whatever is lost
            self.hand_on()
        if self._may_break:
            raise _Asked


@contextmanager
def held_back() -> Iterator[Interruption]:
    """Hold signals back within a `with` block; but for those that are ignored, as in the background of a shell, or that
    other than Python takes."""
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return
    earlier: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {number: handler for number, handler in earlier.items() if handler not in (signal.SIG_IGN, None)}
    interruption = Interruption(earlier)
    for number in taken:
        signal.signal(number, interruption._take)
    try:
        yield interruption
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
