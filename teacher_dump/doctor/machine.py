"""What of a machine `doctor` looks at: versions, torch, devices and their memory, and whether they compute."""

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from shared import __version__
from shared.errors import ConfigError
from teacher_dump.config import TeacherSettings
from teacher_dump.doctor.devices import devices_of, host_memory, memory_of, name_of
from teacher_dump.doctor.finding import Finding, attempt, reason_of, size
from teacher_dump.doctor.requirements import is_older, requirements

NEEDED_EXTRAS = ("", "torch")
DEVELOPERS = "dev"
ASCEND = "torch_npu"


def python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")


def packages() -> Iterator[Finding]:
    """Every package that a dump needs, and of the optional ones those that are there but too old."""
    there = [f"logitferry {__version__}"]
    for each in requirements():
        if each.extra == DEVELOPERS:
            continue
        mend = f"pip install '{each.name}>={each.floor}'"
        found = _version(each.name)
        if found is None and each.extra in NEEDED_EXTRAS:
            yield Finding("packages", "mend", f"{each.name} is not installed; {each.floor} or later is needed", mend)
        elif found is not None and is_older(found, each.floor):
            verdict = "mend" if each.extra in NEEDED_EXTRAS else "warning"
            yield Finding("packages", verdict, f"{each.name} is {found}; {each.floor} or later is needed", mend)
        if found is not None and each.extra in NEEDED_EXTRAS:
            there.append(f"{each.name} {found}")
    yield Finding("packages", "ok", ", ".join(there))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_works() -> Iterator[Finding]:
    """torch loads the modules of other makers' devices while it is imported, and fails where one of them does."""
    ascend = importlib.util.find_spec(ASCEND) is not None
    try:
        import torch

        if ascend:
            importlib.import_module(ASCEND)
    except Exception as error:
        mend = "pip install 'logitferry[torch]'"
        if ascend:
            mend = (
                f"its toolkit CANN has to be loaded first: source /usr/local/Ascend/ascend-toolkit/set_env.sh; "
                f"on a machine without such devices: pip uninstall {ASCEND}"
            )
        what = f"{ASCEND} is installed, but cannot be loaded" if ascend else "cannot be imported"
        yield Finding("torch", "mend", f"{what}: {reason_of(error)}", mend)
        return
    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")


def vllm(teacher: TeacherSettings | None) -> Iterator[Finding]:
    from teacher_dump.vllm_engine import TESTED_VERSIONS, require_vllm, vllm_version

    asked = teacher is not None and teacher.engine == "vllm"
    found = vllm_version()
    if found is None and not asked:
        yield Finding("vllm", "ok", "not installed; engine: transformers needs none")
        return
    if found is None or found.startswith(tuple(f"{release}." for release in TESTED_VERSIONS)):
        if asked:
            require_vllm()
        yield Finding("vllm", "ok", str(found))
    else:
        tested = ", ".join(f"{release}.x" for release in TESTED_VERSIONS)
        mend = f"pip install 'vllm=={TESTED_VERSIONS[-1]}.*', if it gives trouble"
        yield Finding("vllm", "warning", f"{found} is not among the versions that were tested ({tested})", mend)
    if asked:  # its compiled part breaks with another torch than it was built for; seconds, so only where it is needed
        importlib.import_module("vllm.platforms")
        importlib.import_module("vllm").LLMEngine  # noqa: B018  its names are imported when they are looked up


def accelerate(teacher: TeacherSettings | None) -> Iterator[Finding]:
    if teacher is None or teacher.device_map is None:
        return
    found = _version("accelerate")
    if found is None:
        raise ConfigError(
            "teacher.device_map needs accelerate, which is not installed", next_step="pip install accelerate"
        )
    yield Finding("accelerate", "ok", found)


def devices(teacher: TeacherSettings | None) -> Iterator[Finding]:
    """All that there are, then those that the settings ask for."""
    for device in devices_of(None):
        if device.type == "cpu":
            yield Finding("devices", "ok", f"no accelerator; the CPU has {os.cpu_count()} cores")
            continue
        found = memory_of(device)
        room = "does not say how much memory it has" if found is None else f"{size(found[0])} free of {size(found[1])}"
        yield Finding("devices", "ok", f"{device}: {name_of(device)}, {room}")
    if teacher is None:
        return
    used = devices_of(teacher)
    wanted = teacher.vllm.tensor_parallel * teacher.vllm.pipeline_parallel
    elsewhere = teacher.vllm.backend == "ray" or "nnodes" in teacher.vllm.engine_args
    if used[0].type != "cpu" and len(used) < wanted and not elsewhere:
        raise ConfigError(
            f"teacher.vllm: tensor_parallel × pipeline_parallel is {wanted}, but there are {len(used)} devices",
            next_step="ask for no more than there are, or reach over machines with backend: ray",
        )


def memory() -> Iterator[Finding]:
    found = host_memory()
    if found is None:
        yield Finding("memory", "ok", "this system does not say how much there is")
        return
    yield Finding("memory", "ok", f"of the host {size(found[0])} available of {size(found[1])}")


def forward(teacher: TeacherSettings | None, dtypes: Sequence[str]) -> Iterator[Finding]:
    """A small product on every device in use: drivers and builds that do not fit show here, not in the night."""
    import torch

    from shared.device import pick_dtype

    used, _ = attempt("forward", partial(devices_of, teacher))
    if used is None:  # the check of the devices says why
        return
    for device in used:
        for name in dtypes:
            ones = torch.ones(64, 64, dtype=pick_dtype(name), device=device)
            product = (ones @ ones).float().cpu()
            if not bool((product == 64).all()):
                got = sorted({float(value) for value in product.unique()})[:4]
                mend = "try another teacher.dtype; if it stays, the device or its driver is at fault"
                yield Finding("forward", "mend", f"{device}: a product in {name} should be 64, and is {got}", mend)
    yield Finding("forward", "ok", f"tried a product in {' and '.join(dtypes)} on {', '.join(map(str, used))}")
