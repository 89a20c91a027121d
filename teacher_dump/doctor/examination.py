"""Is this machine fit for a dump, and is this config?  Looks, tries in small, and changes nothing.

A dump fails late: after the weights are loaded, or when the disk is full in the morning.  What can be known in seconds
is found out here: versions, devices and whether they compute, memory against the weights, the first record as a row,
and how the output's disk behaves.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from teacher_dump.config import DumpSettings
from teacher_dump.doctor.finding import Finding, guarded
from teacher_dump.doctor.machine import accelerate, devices, forward, memory, packages, python, torch_works, vllm
from teacher_dump.doctor.output import output_folder
from teacher_dump.doctor.run import Opened, data, dtypes_of, model, open_model, tokenizer
from teacher_dump.doctor.weights import weights

__all__ = ["Finding", "examine", "exit_code", "render"]


def examine(settings: DumpSettings | None) -> list[Finding]:
    """What there is to say of this machine, and of a dump with these settings on it."""
    found = [*guarded("python", python), *guarded("packages", packages), *guarded("torch", torch_works)]
    if any(finding.check == "torch" and finding.verdict == "mend" for finding in found):
        # A second attempt to import torch in one process ends in other, misleading errors.
        return [*found, Finding("all else", "warning", "not looked at, because torch cannot be used")]
    teacher = settings.teacher if settings else None
    opened = open_model(teacher) if teacher else Opened()
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
