"""What of any machine a doctor looks at: versions, torch, memory, and whether devices compute."""

import importlib.util
import os
import platform
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from shared import __version__
from shared.amounts import size
from shared.doctor.ascend import PACKAGE, why_not_loaded
from shared.doctor.devices import host_memory
from shared.doctor.finding import Finding, reason_of
from shared.doctor.requirements import installed, is_older, requirements

if TYPE_CHECKING:
    import torch

ALWAYS_NEEDED = ("", "torch")
DEVELOPERS = "dev"


def python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")


def packages(extras: Collection[str] = ()) -> Iterator[Finding]:
    """Every package that a run needs, with those of some extras, and of the others those that are there but too old."""
    needed, there = {*ALWAYS_NEEDED, *extras}, [f"logitferry {__version__}"]
    for each in requirements():
        if each.extra == DEVELOPERS:
            continue
        mend = f"pip install '{each.name}>={each.floor}'"
        found = installed(each.name)
        if found is None and each.extra in needed:
            yield Finding("packages", "mend", f"{each.name} is not installed; {each.floor} or later is needed", mend)
        elif found is not None and is_older(found, each.floor):
            verdict = "mend" if each.extra in needed else "warning"
            yield Finding("packages", verdict, f"{each.name} is {found}; {each.floor} or later is needed", mend)
        if found is not None and each.extra in needed:
            there.append(f"{each.name} {found}")
    yield Finding("packages", "ok", ", ".join(there))


def torch_works() -> Iterator[Finding]:
    """torch loads the modules of other makers' devices while it is imported, and fails where one of them does."""
    try:
        import torch

        if importlib.util.find_spec(PACKAGE) is not None:
            importlib.import_module(PACKAGE)
    except Exception as error:
        mend = "pip install 'logitferry[torch]'"
        yield why_not_loaded(error) or Finding("torch", "mend", f"cannot be imported: {reason_of(error)}", mend)
        return
    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")


def memory() -> Iterator[Finding]:
    found = host_memory()
    if found is None:
        yield Finding("memory", "ok", "this system does not say how much there is")
        return
    yield Finding("memory", "ok", f"of the host {size(found[0])} available of {size(found[1])}")


def products(devices: "Sequence[torch.device]", dtypes: Sequence[str], mend: str) -> Iterator[Finding]:
    """A small product on every device: drivers and builds that do not fit show here, not in the night."""
    import torch

    from shared.device import pick_dtype

    for device in devices:
        for name in dtypes:
            ones = torch.ones(64, 64, dtype=pick_dtype(name), device=device)
            product = (ones @ ones).float().cpu()
            if not bool((product == 64).all()):
                got = sorted({float(value) for value in product.unique()})[:4]
                yield Finding("forward", "mend", f"{device}: a product in {name} should be 64, and is {got}", mend)
    yield Finding("forward", "ok", f"tried a product in {' and '.join(dtypes)} on {', '.join(map(str, devices))}")
