"""Is this machine fit for a dump, and is this config?  Looks, tries in small, and changes nothing.

A dump fails late: after the weights are loaded, or when the disk is full in the morning.  What can be known in seconds
is found out here: versions, devices and whether they compute, memory against the weights, the first record as a row,
and how the output's disk behaves.
"""

from collections.abc import Iterator
from functools import partial

from shared.doctor.finding import Finding, exit_code, guarded, render
from shared.doctor.machine import memory, packages, python, torch_works
from shared.doctor.model import Opened, open_model
from teacher_dump.config import DumpSettings
from teacher_dump.doctor.machine import accelerate, devices, forward, vllm
from teacher_dump.doctor.output import output_folder
from teacher_dump.doctor.run import data, dtypes_of, model, tokenizer
from teacher_dump.doctor.weights import weights

__all__ = ["Finding", "examine", "exit_code", "render"]


def examine(settings: DumpSettings | None) -> list[Finding]:
    """What there is to say of this machine, and of a dump with these settings on it."""
    found = [*guarded("python", python), *guarded("packages", packages), *guarded("torch", torch_works)]
    if any(finding.check == "torch" and finding.verdict == "mend" for finding in found):
        # A second attempt to import torch in one process ends in other, misleading errors.
        return [*found, Finding("all else", "warning", "not looked at, because torch cannot be used")]
    teacher = settings.teacher if settings else None
    opened = open_model(teacher, "teacher") if teacher else Opened()
    found += guarded("vllm", partial(vllm, teacher))
    found += guarded("accelerate", partial(accelerate, teacher))
    found += guarded("devices", partial(devices, teacher))
    found += guarded("memory", memory)
    found += guarded("forward", partial(forward, teacher, dtypes_of(teacher, opened)))
    return found + ([] if settings is None else list(_of_settings(settings, opened)))


def _of_settings(settings: DumpSettings, opened: Opened) -> Iterator[Finding]:
    yield from guarded("model", partial(model, settings.teacher, opened))
    yield from guarded("tokenizer", partial(tokenizer, settings, opened))
    yield from guarded("weights", partial(weights, settings.teacher, opened))
    yield from guarded("data", partial(data, settings, opened))
    yield from guarded("output", partial(output_folder, settings))
