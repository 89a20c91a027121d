"""What of a machine `doctor` looks at for a dump's sake: the engine, the devices that it has, whether they compute."""

import importlib
from collections.abc import Iterator, Sequence
from functools import partial

from shared.doctor.devices import describe
from shared.doctor.finding import Finding, attempt
from shared.doctor.machine import products
from shared.doctor.requirements import installed
from shared.errors import ConfigError
from shared.vllm_start import TESTED_VERSIONS, is_tested, vllm_version
from teacher_dump.config import TeacherSettings
from teacher_dump.doctor.devices import devices_of


def vllm(teacher: TeacherSettings | None) -> Iterator[Finding]:
    from teacher_dump.vllm_engine import require_tested

    asked = teacher is not None and teacher.engine == "vllm"
    found = vllm_version()
    if found is None and not asked:
        yield Finding("vllm", "ok", "not installed; engine: transformers needs none")
        return
    if found is None or is_tested(found):
        if asked:
            require_tested()
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
    found = installed("accelerate")
    if found is None:
        raise ConfigError(
            "teacher.device_map needs accelerate, which is not installed", next_step="pip install accelerate"
        )
    yield Finding("accelerate", "ok", found)


def devices(teacher: TeacherSettings | None) -> Iterator[Finding]:
    """All that there are, then those that the settings ask for."""
    for device in devices_of(None):
        yield Finding("devices", "ok", describe(device))
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


def forward(teacher: TeacherSettings | None, dtypes: Sequence[str]) -> Iterator[Finding]:
    used, _ = attempt("forward", partial(devices_of, teacher))
    if used is None:  # the check of the devices says why
        return
    mend = "try another teacher.dtype; if it stays, the device or its driver is at fault"
    yield from products(used, dtypes, mend)
