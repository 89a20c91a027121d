"""Is this machine fit to train a student, and is this config?  Looks, tries in small, and changes nothing.

What ends a run in its first minutes, or makes all of it worthless, is found out here in seconds: versions that do not
belong together, a device that computes something else than the CPU, a dataset of another tokenizer, a full disk.
"""

from collections.abc import Iterator
from functools import partial

from shared.doctor.ascend import ascend
from shared.doctor.finding import Finding, attempt, exit_code, guarded, render
from shared.doctor.machine import memory, packages, python, torch_works
from shared.doctor.model import Opened, model_found, open_model, tokenizer_found
from student_train.config import TrainSettings
from student_train.doctor.data import Looked, look_at_data
from student_train.doctor.machine import devices, extras_of
from student_train.doctor.room import output_folder, weights
from student_train.doctor.step import made_up_step, real_step

__all__ = ["Finding", "examine", "exit_code", "render"]


def examine(settings: TrainSettings | None) -> list[Finding]:
    """What there is to say of this machine, and of a run with these settings on it."""
    found = [
        *guarded("python", python),
        *guarded("packages", partial(packages, extras_of(settings))),
        *guarded("ascend", ascend),
        *guarded("torch", torch_works),
    ]
    if any(finding.check == "torch" and finding.verdict == "mend" for finding in found):
        # A second attempt to import torch in one process ends in other, misleading errors.
        return [*found, Finding("all else", "warning", "not looked at, because torch cannot be used")]
    found += guarded("devices", partial(devices, settings))
    found += guarded("memory", memory)
    return found + (_of_settings(settings, found) if settings else guarded("step", partial(made_up_step, None)))


def _of_settings(settings: TrainSettings, of_machine: list[Finding]) -> list[Finding]:
    opened = open_model(settings.student, "student")
    found = guarded("model", partial(_model, settings, opened))
    found += guarded("tokenizer", partial(tokenizer_found, settings.student, opened))
    found += guarded("weights", partial(weights, settings, opened))
    looked, broken = attempt("data", partial(look_at_data, settings, opened))
    looked = looked or Looked(findings=broken)
    found += looked.findings
    found += guarded("output", partial(output_folder, settings))
    wrong = {finding.check for finding in (*of_machine, *found) if finding.verdict == "mend"}
    if "devices" in wrong:
        return found
    is_whole = looked.rows and "weights" not in wrong
    step = partial(real_step, settings, looked) if is_whole else partial(made_up_step, settings)
    return found + guarded("step", step)


def _model(settings: TrainSettings, opened: Opened) -> Iterator[Finding]:
    student = settings.student
    computes = f", products in {student.product_dtype}" if student.is_mixed else ""
    yield from model_found(student, opened, f"weights in {student.dtype}{computes}")
