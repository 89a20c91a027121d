"""An estimate for people."""

import shlex
from collections.abc import Sequence

from shared.amounts import duration, size
from student_train.estimate.estimation import Estimate
from student_train.estimate.needs import Change


def describe(found: Estimate, next_step: str) -> list[str]:
    """Line by line, the command to run next at the end."""
    trained = "" if found.trained == found.parameters else f", of which {count(found.trained)} are trained"
    parts = ", ".join(f"{name} {size(value)}" for name, value in vars(found.memory).items())
    lines = [
        f"student      {count(found.parameters)} parameters{trained}; "
        + ("rows are padded" if found.attention is None else f"attention {found.attention}"),
        f"rows         {found.rows:,}, the longest {found.longest_row:,} tokens; {found.sampled:,} were looked at",
        f"tokens       {count(found.tokens)} of an epoch, of which {count(found.positions)} are supervised",
        f"steps        {found.steps:,}, {found.epochs:.2f} epochs; {found.passes_per_step:.1f} forward passes each, "
        f"{100 * found.padding:.1f} % padding",
        f"memory       {size(found.total_bytes)} on each of {found.ranks} × {found.device}: {parts}"
        if found.ranks > 1
        else f"memory       {size(found.total_bytes)} on {found.device}: {parts}",
        f"             in a forward pass of {found.pass_tokens:,} tokens",
        f"operations   {found.operations:.2e}, {_time(found)}",
        f"disk         {size(found.checkpoints_bytes)} for checkpoints of {size(found.checkpoint_bytes)}, "
        f"{size(found.model_bytes)} for the model",
        f"verdict      {_verdict(found)}",
        *(f"             {_change(each)}" for each in found.changes),
    ]
    return [*lines, f"  next: {next_step}"]


def next_step(found: Estimate, config: str, overrides: Sequence[str], memory: str | None) -> str:
    """Run, or look again with the first change that lets it fit."""
    of = shlex.join([config, *(word for each in overrides for word in ("--set", each))])
    if found.fits and found.ranks > 1:
        return f"torchrun --nproc-per-node {found.ranks} -m student_train run {of}"
    if found.fits:
        return f"student-train run {of}"
    estimate = f"student-train estimate {of}"
    if found.fits is None:
        return f"{estimate} --memory 80GiB, or as much as the device has"
    fitting = next((each for each in found.changes if each.fits), None)
    if fitting is None:
        return "take a smaller student, a device with more memory, or student.lora"
    settings = "".join(f" --set {setting}" for setting in fitting.settings)
    ranks = f" --ranks {fitting.ranks}" if fitting.ranks > 1 else ""
    return f"{estimate}{settings}{ranks}" + (f" --memory {shlex.quote(memory)}" if memory else "")


def _verdict(found: Estimate) -> str:
    if found.device_memory_bytes is None:
        return "unknown: the device does not say how much memory it has"
    of = f"{size(found.device_memory_bytes)}, of which {size(found.aside_bytes)} are taken to be in other use"
    if found.fits:
        return f"fits into {of}"
    first = "; any of these needs:" if found.changes else ""
    return f"does not fit into {of}{first}"


def _change(each: Change) -> str:
    ranks = f" on at least {each.ranks} processes" if "parallel=fsdp" in each.settings else ""
    fits = "fits" if each.fits else "does not fit"
    return f"{size(each.total_bytes):>10}  {', '.join(each.settings)}{ranks}: {fits}"


def _time(found: Estimate) -> str:
    if found.seconds is None or found.peak_flops is None:
        return "in unknown time: set log.peak_tflops for the device's"
    of = f"{100 * found.assumed_mfu:.0f} % (assumed) of {found.peak_flops / 1e12:,.0f} Tflop/s"
    return f"{duration(found.seconds)} at {of}"


def count(number: int) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)
