"""Steps of a pipeline that run side by side: what is slow to make is made ahead, what is slow to put away is put
away behind.  Each in one thread, in order, with a bound on what waits; errors reach whoever takes the results.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_END = object()


@contextmanager
def _closed(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Their iterator, closed at the end however it comes, and not only when nothing refers to it any more."""
    iterator = iter(items)
    try:
        yield iterator
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


def made_ahead(items: Iterable[T], depth: int, stop: threading.Event | None = None) -> Iterator[T]:
    """The items, up to `depth` of them made before they are asked for.

    `stop` is set when nobody asks any more, for `items` that take long to make one.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as executor:
        pending = deque(executor.submit(next, iterator, _END) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(executor.submit(next, iterator, _END))
                yield item  # pyright: ignore[reportReturnType]
        finally:
            if stop is not None:
                stop.set()
            for future in pending:
                future.cancel()


class MadeAhead(Iterator[T]):
    """The same; a wait for an item may be broken off by an exception and taken up again.  Close it at the end.

    Closing waits for nothing: what is being made then is finished in its thread and forgotten.
    """

    def __init__(self, items: Iterable[T], depth: int, stop: threading.Event) -> None:
        self._items, self._stop = iter(items), stop
        self._executor = ThreadPoolExecutor(1)
        self._pending = deque(self._executor.submit(next, self._items, _END) for _ in range(depth))

    def __next__(self) -> T:
        item = self._pending[0].result()
        if item is _END:
            raise StopIteration
        self._pending.append(self._executor.submit(next, self._items, _END))
        self._pending.popleft()
        return item  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        self._stop.set()
        self._executor.shutdown(wait=False, cancel_futures=True)


def put_away(work: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """`work` of each item in order, done while the next items are made; at most `depth` wait.

    What was begun or waits when an item cannot be made, or nobody takes the results any more, is still finished.
    """
    with ThreadPoolExecutor(1) as executor, _closed(items) as items:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(executor.submit(work, item))
            while pending and (len(pending) > depth or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Stopwatch:
    """How long the steps of a pipeline were waited for; each takes what the one before it makes."""

    def __init__(self, *steps: str) -> None:
        self._start_s = time.monotonic()
        self._waited_s = dict.fromkeys(steps, 0.0)

    def of(self, step: str, items: Iterable[T]) -> Generator[T]:
        """What the step makes."""
        with _closed(items) as iterator:
            while True:
                begin_s = time.monotonic()
                item = next(iterator, _END)
                self._waited_s[step] += time.monotonic() - begin_s
                if item is _END:
                    return
                yield item  # pyright: ignore[reportReturnType]

    def shares(self) -> dict[str, float]:
        """Of the time since the start, for each step without those that it waited for itself."""
        total_s = time.monotonic() - self._start_s
        before_s = [0.0, *self._waited_s.values()]
        return {
            step: (waited_s - earlier_s) / total_s
            for (step, waited_s), earlier_s in zip(self._waited_s.items(), before_s, strict=False)
        }

    def summary(self) -> str:
        """For people."""
        return ", ".join(f"{step} {100 * share:.0f} %" for step, share in self.shares().items())
