"""What reading something hostile ends in, found out by a process with little memory and time.

What is not refused in time fails there, not on the machine of whoever runs the tests.
"""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPARE_BYTES = 2 << 30
FINE = "read without an error"


def ended_in(read: Callable[[], Any]) -> str:
    """Class and words of the error that `read` ends in, or FINE."""
    try:
        read()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return FINE


def outcomes(*reads: Callable[[], Any], seconds: int = 20) -> list[str]:
    """What each ends in in a process of its own, or what signal that died of.

    It may take so long, and 2 GiB more memory than this process has.
    """
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        used_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = used_pages * os.sysconf("SC_PAGE_SIZE") + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(seconds)  # what waits for a pipe for ever dies of it
        with os.fdopen(send, "w") as pipe:
            json.dump([ended_in(read)[:20_000] for read in reads], pipe)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(text) if status == 0 else [f"died of signal {status}"] * len(reads)


def outcome(read: Callable[[], Any], seconds: int = 20) -> str:
    return outcomes(read, seconds=seconds)[0]
