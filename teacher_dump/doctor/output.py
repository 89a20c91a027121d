"""What of an output folder `doctor` looks at: may it be written, is there room, and how long until a file is safe?

A dump commits every shard with fsync and rename, so that is tried here, in a folder that is gone afterwards.  An output
that is not there yet is not made: the nearest folder above it that exists stands for it.  At a URL only writing is
tried.
"""

import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shared.errors import ConfigError, OutputError
from shared.files import claim_folder, write_atomically
from shared.folders import PROBE, Folder, LocalFolder, open_folder
from shared.text_files import TextFile, find_text_files
from teacher_dump.config import DumpSettings, KeepSettings
from teacher_dump.doctor.finding import MIB, Finding, attempt, size

MOUNTS = Path("/proc/mounts")
OVER_A_NETWORK = re.compile(
    r"nfs\d?|lustre|cifs|smb\w*|beegfs|gpfs|ceph|glusterfs|9p|virtiofs|afs|orangefs|wekafs|fuse\..*"
)
TRIES, TRY_BYTES = 5, MIB
SLOW_S = 0.25
MIN_FREE_BYTES = 256 * MIB
TEXT_BYTES_PER_TOKEN = 4
COMPRESSED_BY = 4


def output_folder(settings: DumpSettings) -> Iterator[Finding]:
    """Room, what holds it, and how fast it is."""
    from teacher_dump.ledger import OURS

    folder = open_folder(settings.output)
    if not isinstance(folder, LocalFolder):
        yield from _elsewhere(folder)
        return
    output = folder.path
    place = output.absolute()
    while not os.path.lexists(place):  # ends at the root
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"output {output} cannot be made: {place} is not a folder", next_step="give another `output`")
    if place == output.absolute():
        claim_folder(output, OURS)
    yield _room(settings, place)
    yield from _file_system(place)
    wait_s = _seconds_until_safe(place)
    found = f"{size(TRY_BYTES)} written, synced and renamed in {place} in {1000 * wait_s:.0f} ms (median of {TRIES})"
    if wait_s > SLOW_S:
        mend = "every shard waits so long: larger unit_records makes fewer, a local disk is faster"
        yield Finding("output", "warning", found, mend)
    else:
        yield Finding("output", "ok", found)


def _elsewhere(folder: Folder) -> Iterator[Finding]:
    """May an object store be written, and how long does that take?"""
    from teacher_dump.ledger import OURS

    folder.claim(OURS)
    waits = []
    for number in range(TRIES):
        begin = time.monotonic()
        folder.write(f"{PROBE}{number}", os.urandom(TRY_BYTES))
        waits.append(time.monotonic() - begin)
        folder.remove(f"{PROBE}{number}")
    wait_ms = 1000 * statistics.median(waits)
    yield Finding("output", "ok", f"{size(TRY_BYTES)} written to {folder.name} in {wait_ms:.0f} ms (median of {TRIES})")


def _room(settings: DumpSettings, place: Path) -> Finding:
    free = shutil.disk_usage(place).free
    found = f"{settings.output}: {size(free)} free"
    if free < MIN_FREE_BYTES:
        return Finding("disk", "mend", found, f"make room, {size(MIN_FREE_BYTES)} at the very least, or move `output`")
    text_bytes, _ = attempt("disk", lambda: sum(map(_text_bytes, find_text_files(settings.data.files))))
    if text_bytes is None:  # the check of the data says why
        return Finding("disk", "ok", found)
    most = text_bytes / TEXT_BYTES_PER_TOKEN * bytes_per_position(settings.keep)
    found += f"; if all of the text were supervised, about {size(most)} would be written"
    if most > free:
        return Finding("disk", "warning", found, "make room, or keep less: keep.k, keep.min_prob, method: threshold")
    return Finding("disk", "ok", found)


def bytes_per_position(keep: KeepSettings) -> float:
    """What a synthetic teacher takes whose ids nobody can guess; real text takes less.  See README.md, The dataset."""
    return 74 if keep.method == "threshold" else 10 + 2.2 * keep.k


def _text_bytes(file: TextFile) -> int:
    parts = file.fs.find(file.path) if file.format == "datasets" else [file.path]
    stored = sum(int(file.fs.size(part) or 0) for part in parts)
    return stored * COMPRESSED_BY if file.compression or file.format == "parquet" else stored


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
