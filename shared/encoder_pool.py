"""Batches of records encoded in this process, or side by side in several, and given back in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from shared.encode import BatchEncoder, Encoded
from shared.errors import LogitferryError
from shared.raw_records import BadRecord
from shared.records import Record

BATCHES_AHEAD = 2
"""Per process."""

Batch = Sequence[Record | BadRecord]


class EncoderPool:
    """Encodes batches.  The processes start with the first batch; `close` ends them."""

    def __init__(self, encoder: BatchEncoder, processes: int) -> None:
        self._encoder = encoder
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[Encoded]]]:
        """Every batch with what became of its records.

        Raises:
            MismatchError: see `BatchEncoder.encode`.
            LogitferryError: a process died.
        """
        if self._processes == 1:
            for batch in batches:
                yield batch, self._encoder.encode(batch)
            return
        executor = self._open()
        under_way: deque[tuple[Batch, Future[list[Encoded]]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, executor.submit(_encode, batch)))
                if len(under_way) > BATCHES_AHEAD * self._processes:
                    first, future = under_way.popleft()
                    yield first, future.result()
            while under_way:
                first, future = under_way.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            _stop_waiting_for_readers(executor)
            raise LogitferryError(
                "a process that tokenizes died, as for want of memory", next_step="run again with fewer `processes`"
            ) from None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _open(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Not forks of this process, which would inherit its threads' locks and its CUDA context.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["shared.encode"])
            self._executor = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=_begin, initargs=(self._encoder,)
            )
        return self._executor


def _stop_waiting_for_readers(executor: ProcessPoolExecutor) -> None:
    """A pool that broke while a batch was on its way to a process waits for ever for somebody to read the rest of it:
    its own end of the pipe is still open.  Python closes that itself since 3.11.5 (python/cpython#94777)."""
    queue: Any = getattr(executor, "_call_queue", None)
    if queue is not None:
        queue._reader.close()


_of_this_process: list[BatchEncoder] = []


def _begin(encoder: BatchEncoder) -> None:
    _of_this_process.append(encoder)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the rest
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch) -> list[Encoded]:
    return _of_this_process[0].encode(batch)
