"""Signals that are held back: nothing is broken off but what may be, and nobody's signal is lost."""

import os
import signal
import threading
import time

import pytest

from shared.interruption import held_back


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # where it is taken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGALRM])
def test_a_signal_waits_and_is_handed_on(number: int):
    taken: list[int] = []
    earlier = signal.signal(number, lambda n, _: taken.append(n))
    try:
        with held_back() as interruption:
            assert not interruption.came
            interruption.hand_on()
            send(number)
            assert interruption.came
            assert not taken
            with pytest.raises(KeyboardInterrupt):
                interruption.hand_on()
            assert taken == [number]
        send(number)
        assert taken == [number, number], "from here on nothing is held back"
    finally:
        signal.signal(number, earlier)


def test_a_wait_is_broken_off_and_work_is_not():
    with held_back() as interruption:
        assert interruption.unless_asked(lambda: 5) == 5
        begin_s = time.monotonic()
        threading.Timer(0.1, send).start()
        assert interruption.unless_asked(lambda: time.sleep(30)) is None
        assert time.monotonic() - begin_s < 10
        assert interruption.came
        assert interruption.unless_asked(lambda: 5) is None, "nothing is begun any more"
        time.sleep(0.01)


def test_errors_of_what_is_waited_for_reach_the_caller():
    with held_back() as interruption, pytest.raises(KeyError):
        interruption.unless_asked(lambda: {}["nothing"])


def test_ctrl_c_twice_ends_it_at_once():
    with held_back() as interruption:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert interruption.came


def test_sigterm_twice_is_sigterm():
    """Schedulers say it more than once, and the checkpoint is being written."""
    with held_back() as interruption:
        send()
        send()
        assert interruption.came


def test_what_is_ignored_stays_ignored():
    """As a shell sets SIGINT for what runs in its background."""
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_back() as interruption:
            send(signal.SIGINT)
            assert not interruption.came
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_in_another_thread_there_is_nothing_to_hold_back():
    seen: list[bool] = []

    def work() -> None:
        with held_back() as interruption:
            seen.append(interruption.came)
            assert interruption.unless_asked(lambda: 7) == 7

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
