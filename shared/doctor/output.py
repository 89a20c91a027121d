"""What of an output folder a doctor looks at: may it be written, is there room, and how long until a file is safe?

Runs commit with fsync and rename, so that is tried here, in a folder that is gone afterwards.  An output that is not
there yet is not made: the nearest folder above it that exists stands for it.  At a URL only writing is tried.
"""

import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shared.amounts import size
from shared.doctor.finding import Finding
from shared.errors import ConfigError, OutputError
from shared.files import claim_folder, write_atomically
from shared.folders import PROBE, Folder, LocalFolder, open_folder

MOUNTS = Path("/proc/mounts")
OVER_A_NETWORK = re.compile(
    r"nfs\d?|lustre|cifs|smb\w*|beegfs|gpfs|ceph|glusterfs|9p|virtiofs|afs|orangefs|wekafs|fuse\..*"
)
MIB = 1 << 20
TRIES, TRY_BYTES = 5, MIB
SLOW_S = 0.25
MIN_FREE_BYTES = 256 * MIB


def output_folder(
    output: str, ours: Sequence[str], room: Callable[[str, int], Finding], *, slow: str
) -> Iterator[Finding]:
    """Room, what holds it, and how fast it is.

    `ours` tells a folder of ours from another's, see `shared.files.claim_folder`; `room` judges the free bytes, of
    which it is given a description as well; `slow` is what to do about a slow disk.
    """
    folder = open_folder(output)
    if not isinstance(folder, LocalFolder):
        yield from _elsewhere(folder, ours)
        return
    place = folder.path.absolute()
    while not os.path.lexists(place):  # ends at the root
        place = place.parent
    if not place.is_dir():
        raise ConfigError(
            f"output {folder.path} cannot be made: {place} is not a folder", next_step="give another `output`"
        )
    if place == folder.path.absolute():
        claim_folder(folder.path, ours)
    yield _room(output, place, room)
    yield from _file_system(place)
    wait_s = _seconds_until_safe(place)
    found = f"{size(TRY_BYTES)} written, synced and renamed in {place} in {1000 * wait_s:.0f} ms (median of {TRIES})"
    yield Finding("output", "warning" if wait_s > SLOW_S else "ok", found, slow if wait_s > SLOW_S else None)


def _elsewhere(folder: Folder, ours: Sequence[str]) -> Iterator[Finding]:
    """May an object store be written, and how long does that take?"""
    folder.claim(ours)
    waits = []
    for number in range(TRIES):
        begin = time.monotonic()
        folder.write(f"{PROBE}{number}", os.urandom(TRY_BYTES))
        waits.append(time.monotonic() - begin)
        folder.remove(f"{PROBE}{number}")
    wait_ms = 1000 * statistics.median(waits)
    yield Finding("output", "ok", f"{size(TRY_BYTES)} written to {folder.name} in {wait_ms:.0f} ms (median of {TRIES})")


def _room(output: str, place: Path, room: Callable[[str, int], Finding]) -> Finding:
    free = shutil.disk_usage(place).free
    found = f"{output}: {size(free)} free"
    if free < MIN_FREE_BYTES:
        return Finding("disk", "mend", found, f"make room, {size(MIN_FREE_BYTES)} at the very least, or move `output`")
    return room(found, free)


def _file_system(place: Path) -> Iterator[Finding]:
    """Says where a folder lies on another machine."""
    if not MOUNTS.exists():
        return
    real, longest, kind, source = os.path.realpath(place), -1, "", ""
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        device, mounted, type_name = line.split(" ")[:3]
        mounted = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), mounted)
        is_above = real == mounted or real.startswith(mounted.rstrip("/") + "/")
        if is_above and len(mounted) >= longest:  # of two at one place the latter hides the other
            longest, kind, source = len(mounted), type_name, device
    if OVER_A_NETWORK.fullmatch(kind):
        yield Finding("output", "warning", f"{place} is {kind} ({source}), which mostly is over a network")


def _seconds_until_safe(place: Path) -> float:
    waits = []
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            for number in range(TRIES):
                content = os.urandom(TRY_BYTES)
                begin = time.monotonic()
                write_atomically(Path(folder) / f"try-{number}", content)
                waits.append(time.monotonic() - begin)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"output {place} cannot be written: {error.strerror}", next_step="mend the folder's permissions"
        ) from None
    return statistics.median(waits)
