"""The versions that logitferry asks for, from its own metadata; in a checkout that is not installed, pyproject.toml."""

import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
WITH_FLOOR = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([0-9.]+)(?:.*extra == ['\"]([\w-]+))?")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """`extra` is empty for what is always needed."""

    name: str
    floor: str
    extra: str


def requirements() -> list[Requirement]:
    """Each that has a lowest version, as `logitferry` states it."""
    found = [WITH_FLOOR.match(line) for line in _stated()]
    return [Requirement(name=each[1], floor=each[2], extra=each[3] or "") for each in found if each]


def _stated() -> list[str]:
    try:
        return requires("logitferry") or []
    except PackageNotFoundError:
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        optional = project["optional-dependencies"].items()
        return project["dependencies"] + [f"{line}; extra == '{extra}'" for extra, lines in optional for line in lines]


def installed(name: str) -> str | None:
    """The version of a package that is here."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_older(found: str, floor: str) -> bool:
    """By the numbers that a version begins with: 2.6.0rc1 and 2.6+cpu are 2.6."""
    return _numbers(found) < _numbers(floor)


def _numbers(found: str) -> list[int]:
    begin = re.match(r"[0-9.]*", found)
    numbers = [int(part) for part in begin[0].split(".") if part] if begin else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
