"""Runs and evaluations made up for the report: what the trainer would leave, without training."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Line = dict[str, Any]


def config(**more: Any) -> dict[str, Any]:
    tree = {"student": {"model": "models/small"}, "data": {"dataset": "dumps/train"}, "output": "kd", "steps": 400}
    return tree | more


def step_line(step: int) -> Line:
    """A healthy step of 400."""
    share = step / 400
    return {
        "step": step,
        "loss": 1.0 - 0.5 * share,
        "ce": 2.0 - share,
        "kd": 0.5 * math.exp(-3 * share),
        "lr": 1e-5 * (1 - share),
        "grad_norm": 0.8,
        "positions": 1000,
        "agreement": 0.6 + 0.3 * share,
        "teacher_entropy": 0.7,
        "student_entropy": 0.8,
        "kept_mass": 0.98,
        "student_kept_mass": 0.9 + 0.07 * share,
        "tokens_per_s": 5000.0,
        "wait": 0.01,
        "waste": 0.02,
        "peak_bytes": 3 << 30,
        "elapsed_s": 2.0 * step,
    }


def held_out_line(step: int, **means: float | None) -> Line:
    found = {"positions": 300, "ce": 2.1 - step / 400, "kl": 0.4, "ece": 0.03, "agreement": 0.7}
    return {"step": step, "held_out": found | means, "elapsed_s": 2.0 * step}


def log_lines(
    steps: int = 400, *, every: int = 100, change: Callable[[Line], Line | None] = lambda line: line
) -> list[Line]:
    """Lines of a run; `change` may bend those of the steps."""
    lines = [held_out_line(0)]
    for step in range(1, steps + 1):
        lines += [line] if (line := change(step_line(step))) is not None else []
        lines += [held_out_line(step)] if step % every == 0 else []
    return lines


def made_run(
    folder: Path,
    lines: list[Line] | None = None,
    *,
    tree: dict[str, Any] | None = None,
    finished: bool = True,
    held_out: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree or config()))
    lines = log_lines() if lines is None else lines
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "run.json").write_text(json.dumps({"steps": lines[-1]["step"]}))
    if held_out is not None:
        (folder / "held_out.json").write_text(json.dumps(held_out))
    return folder


def worst_row(tokens: list[str], kl: list[float] | None, ce: list[float], sample_id: str = "row-0") -> dict[str, Any]:
    """The last tokens of it are supervised, as many as there are of `ce`."""
    begin = len(tokens) - len(ce)
    has_teacher = kl is not None
    return {
        "sample_id": sample_id,
        "source": "dumps/dev",
        "ce": sum(ce) / max(len(ce), 1),
        "kl": sum(kl) / max(len(kl), 1) if kl is not None else None,
        "tokens": tokens,
        "supervised_P": list(range(begin, len(tokens))),
        "ce_P": ce,
        "kl_P": kl,
        "realised_P": [0.25] * len(ce) if has_teacher else None,
        "teacher_top_P": [(" fox", 0.5)] * len(ce) if has_teacher else None,
        "student_top_P": [(" dog", 0.75)] * len(ce),
    }


def evaluation(worst: list[dict[str, Any]] | None = None, *, has_teacher: bool = True) -> dict[str, Any]:
    means: dict[str, Any] = {"positions": 100, "ce": 1.25, "accuracy": 0.6, "ece": 0.04, "student_entropy": 0.8}
    for name in ("kl", "agreement", "kept_mass", "student_kept_mass", "teacher_entropy"):
        means[name] = 0.5 if has_teacher else None
    return {
        "student": "models/small",
        "step": 400,
        "rows": 7,
        "means": means,
        "calibration": [
            {"count": 0, "confidence": 0, "accuracy": 0},
            {"count": 40, "confidence": 0.5, "accuracy": 0.3},
            {"count": 60, "confidence": 0.9, "accuracy": 0.8},
        ],
        "kept_mass": {"edges": [0.0, 0.9, 1.0], "counts": [3, 97]} if has_teacher else None,
        "worst": worst or [],
    }
