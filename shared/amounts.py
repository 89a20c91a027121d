"""Times and sizes as people write and read them."""

import re

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def duration(seconds: float) -> str:
    """Two or three digits and a unit: 2.4 s, 95 s, 12 min, 3.5 h."""
    if seconds < 10:
        return f"{max(seconds, 0):.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def seconds_of(text: str) -> float:
    """What 3h50m, 90s, 1d or 2h 30m is in seconds.

    Raises:
        ValueError: it is no such time, or none at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", text)
    whole = re.fullmatch(r"(\s*\d+(?:\.\d+)?\s*[dhms]\s*)+", text)
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    if whole is None or not seconds:
        raise ValueError(f"{text!r} is no time; write it like 3h50m, 45m or 90s")
    return seconds


def size(size_bytes: float) -> str:
    """In powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
