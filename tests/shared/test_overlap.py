"""Steps side by side: nothing lost, nothing out of order, no error swallowed, no thread left."""

import threading
import time
from collections.abc import Iterator

import pytest

from shared.overlap import Stopwatch, made_ahead, put_away


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 10])
def test_everything_comes_through_once_and_in_order(depth: int, count: int):
    assert list(made_ahead(range(count), depth)) == list(range(count))
    assert list(put_away(lambda n: n * n, range(count), depth)) == [n * n for n in range(count)]


def test_items_are_made_before_they_are_asked_for_but_no_more_than_the_depth():
    made: list[int] = []
    first_three = threading.Event()

    def items() -> Iterator[int]:
        for n in range(10):
            made.append(n)
            if n == 2:
                first_three.set()
            yield n

    ahead = made_ahead(items(), 2)
    assert next(ahead) == 0
    assert first_three.wait(5), "two more are made while the first is used"
    time.sleep(0.05)
    assert made == [0, 1, 2]
    ahead.close()


def test_work_goes_on_while_the_next_item_is_made():
    begun, gone_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert begun.wait(5), "the first item is worked on already"
        gone_on.set()
        yield 1

    def work(n: int) -> int:
        begun.set()
        assert n or gone_on.wait(5), "the second item is made meanwhile"
        return n

    assert list(put_away(work, items(), 2)) == [0, 1]


def test_at_most_the_depth_waits_to_be_put_away():
    waiting, most, lock = 0, 0, threading.Lock()

    def items() -> Iterator[int]:
        nonlocal waiting, most
        for n in range(12):
            with lock:
                waiting += 1
                most = max(most, waiting)
            yield n

    def slow(n: int) -> int:
        nonlocal waiting
        time.sleep(0.01)
        with lock:
            waiting -= 1
        return n

    assert list(put_away(slow, items(), 2)) == list(range(12))
    assert most <= 4, "two that wait, one in work, one just made"


def collect(items: Iterator[int], into: list[int]) -> None:
    for item in items:
        into.append(item)


def failing(after: int) -> Iterator[int]:
    yield from range(after)
    raise OSError("the disk is gone")


def test_an_error_of_the_maker_reaches_the_taker_after_what_was_made():
    taken: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        collect(made_ahead(failing(3), 2), taken)
    assert taken == [0, 1, 2]
    ahead = made_ahead(failing(1), 5)
    assert next(ahead) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_an_error_of_the_work_reaches_the_taker():
    def work(n: int) -> int:
        if n == 3:
            raise OSError("the disk is full")
        return n

    done: list[int] = []
    with pytest.raises(OSError, match="the disk is full"):
        collect(put_away(work, range(100), 2), done)
    assert done == [0, 1, 2]


def test_what_was_handed_over_is_put_away_although_the_next_cannot_be_made():
    done: list[int] = []

    def work(n: int) -> None:
        time.sleep(0.02)
        done.append(n)

    with pytest.raises(OSError, match="the disk is gone"):
        list(put_away(work, failing(3), 5))
    assert done == [0, 1, 2]


def test_what_makes_the_items_is_closed_before_an_error_is_raised():
    """It may hold a device; whoever catches the error may want to open it again."""
    closed: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.append("items")

    def work(_n: int) -> None:
        raise OSError("the disk is full")

    watch = Stopwatch("items", "work")
    error: OSError | None = None
    try:
        list(watch.of("work", put_away(work, watch.of("items", items()), 2)))
    except OSError as caught:
        error = caught
        assert closed == ["items"]
    assert error is not None


def test_no_thread_is_left():
    before = threading.active_count()
    ahead = made_ahead(range(100), 3)
    next(ahead)
    ahead.close()
    with pytest.raises(OSError, match="gone"):
        list(put_away(lambda n: n, failing(2), 1))
    assert threading.active_count() == before


def test_each_step_is_charged_for_its_own_time_alone():
    def slowly(seconds: float, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            time.sleep(seconds)
            yield item

    watch = Stopwatch("text", "the teacher")
    texts = watch.of("text", slowly(0.02, iter(range(5))))
    list(watch.of("the teacher", slowly(0.06, texts)))
    shares = watch.shares()
    assert 0.15 < shares["text"] < 0.4
    assert 0.55 < shares["the teacher"] < 0.85
    assert watch.summary().startswith("text ")


def test_what_takes_long_to_make_is_told_when_nobody_asks_any_more():
    """So that an interruption need not wait for it."""
    stop = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        assert stop.wait(timeout=60), "nobody said so"

    ahead = made_ahead(slow(), 2, stop)
    assert next(iter(ahead)) == 1
    ahead.close()  # type: ignore[attr-defined]
    assert stop.is_set()
