"""Which torch_npu goes with which torch and which CANN.

Every torch_npu is built for one torch: 2.10.0.post4 for torch 2.10.0.  With which CANN it was released says the table
in COMPATIBILITY.md of https://gitcode.com/Ascend/pytorch (as of August 2026), for 2.10.0 and 2.10.0.post2 README.md of
the branches v2.12.0 and master, for 2.14.0 the README in the wheel itself.  Which others it runs with says the table of
compatibility in docs/zh/release_notes.md there: releases 7.3, 26.0 and 26.1, which came with CANN 8.5, 9.0 and 9.1, run
with any of these three.
"""

import re

RELEASED_WITH = {
    "2.14.0": "9.1",
    "2.12.0": "9.1",
    "2.11.0": "9.1",
    "2.10.0.post4": "9.1",
    "2.10.0.post2": "9.0",
    "2.10.0": "9.0",
    "2.9.0.post6": "9.1",
    "2.9.0.post2": "9.0",
    "2.9.0": "8.5",
    "2.8.0.post4": "9.0",
    "2.8.0.post2": "8.5",
    "2.8.0": "8.3",
    "2.7.1.post8": "9.1",
    "2.7.1.post4": "9.0",
    "2.7.1.post2": "8.5",
    "2.7.1": "8.3",
    "2.6.0.post5": "8.5",
    "2.6.0.post3": "8.3",
    "2.6.0": "8.2",
}
"""torch_npu to the series of CANN; the newest of each torch first."""
EXCHANGEABLE = {"8.5", "9.0", "9.1"}
BEYOND_THE_TABLE = {"2.14.0"}
"""Newer than what is known to run with several of CANN's series."""


def torch_of(package: str) -> str:
    """The release of torch that a torch_npu is built for, or that a version of torch is of: 2.10.0."""
    found = re.match(r"\d+(?:\.\d+){0,2}", package)
    return found[0] if found else package


def series_of(cann: str) -> str:
    """8.3.RC2 is of 8.3, 9.1.0-beta.2 of 9.1."""
    found = re.match(r"\d+\.\d+", cann)
    return found[0] if found else cann


def released_with(package: str) -> str | None:
    """The series of CANN that a torch_npu was released with, where that is known; +git… and the like do not count."""
    return RELEASED_WITH.get(package.partition("+")[0])


def fit(package: str, cann: str) -> bool | None:
    """Whether a torch_npu is published as running with a CANN; None where that is not known."""
    own, series = released_with(package), series_of(cann)
    if own is None:
        return None
    is_exchangeable = package.partition("+")[0] not in BEYOND_THE_TABLE and {own, series} <= EXCHANGEABLE
    return own == series or is_exchangeable


def package_for(cann: str | None, torch: str | None = None) -> str | None:
    """The newest torch_npu that was released with a CANN, for one release of torch where that is given."""
    for package, series in RELEASED_WITH.items():
        if cann in (None, series) and torch in (None, torch_of(package)):
            return package
    return None
