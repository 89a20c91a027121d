"""What of a dump's output `doctor` looks at: what may be written, against the room that there is."""

from collections.abc import Iterator

from shared.amounts import size
from shared.doctor import output
from shared.doctor.finding import Finding, attempt
from shared.text_files import TextFile, find_text_files
from teacher_dump.config import DumpSettings, KeepSettings

SLOW = "every shard waits so long: larger unit_records makes fewer, a local disk is faster"
TEXT_BYTES_PER_TOKEN = 4
COMPRESSED_BY = 4


def output_folder(settings: DumpSettings) -> Iterator[Finding]:
    """Room, what holds it, and how fast it is."""
    from teacher_dump.ledger import OURS

    def room(found: str, free: int) -> Finding:
        return _room(settings, found, free)

    yield from output.output_folder(settings.output, OURS, room, slow=SLOW)


def _room(settings: DumpSettings, found: str, free: int) -> Finding:
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
