"""What a check of `doctor` found.  No exception leaves a check: it becomes a finding, and the other checks go on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from shared.errors import LogitferryError

T = TypeVar("T")


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


def render(findings: Sequence[Finding]) -> list[str]:
    """Lines for people: verdict, check, what was found, and below it what to do."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.verdict:<7}  {finding.check:<{width}}  {_one_line(finding.found)}")
        if finding.next_step and finding.verdict != "ok":
            lines.append(f"  next: {_one_line(finding.next_step)}")
    return lines


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where something has to be mended before a run, else 0."""
    return int(any(finding.verdict == "mend" for finding in findings))


def _one_line(text: str) -> str:
    return " ".join(text.split())
