"""What a check of `doctor` found.  No exception leaves a check: it becomes a finding, and the other checks go on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from shared.errors import LogitferryError

T = TypeVar("T")
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Finding:
    """`warning` is for what a run survives, `mend` for what would stop it."""

    check: str
    verdict: Literal["ok", "warning", "mend"]
    found: str
    next_step: str | None = None


def guarded(check: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """All that `look` yields, and where it ends in an exception one more."""
    found: list[Finding] = []
    _, failed = attempt(check, lambda: found.extend(look()))
    return found + failed


def attempt(check: str, work: Callable[[], T]) -> tuple[T | None, list[Finding]]:
    """What `work` gives, or None and why there is nothing."""
    try:
        return work(), []
    except LogitferryError as error:
        return None, [Finding(check, "mend", str(error.args[0]), error.next_step)]
    except (Exception, SystemExit) as error:  # libraries have been seen to exit while they are imported
        return None, [Finding(check, "mend", reason_of(error), "if this says nothing to you, report it with all lines")]


def reason_of(error: BaseException) -> str:
    """Type and message, with those of the errors behind it, where the real reason mostly is."""
    reasons = []
    reached: BaseException | None = error
    while reached is not None and len(reasons) < 4:
        reasons.append(f"{type(reached).__name__}: {' '.join(str(reached).split())}")
        reached = reached.__cause__
    return "; ".join(reasons)


def size(num_bytes: float) -> str:
    """For people."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:,.1f} MiB"
