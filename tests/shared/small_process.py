"""What reading something hostile ends in, found out by a process with little memory and time.

What is not refused in time fails there, not on the machine of whoever runs the tests.
"""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPARE_BYTES = 2 << 30
FINE = "read without an error"


def outcome(read: Callable[[], Any], seconds: int = 20) -> str:
    """Class and words of the error, or FINE, or what signal the process died of.

    It may take so long, and 2 GiB more memory than this process has.
    """
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            used_pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = used_pages * os.sysconf("SC_PAGE_SIZE") + SPARE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(seconds)  # what waits for a pipe for ever dies of it
            read()
            text = FINE
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(send, text.encode("utf-8", "replace")[:60_000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitpid(pid, 0)[1]
    return text if status == 0 else f"died of signal {status}"
