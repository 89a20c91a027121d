"""One evaluation: check all that can be checked, load the student once, look at it, write eval.json.

eval.json is written at the end, whole; an evaluation that is interrupted leaves none and is run again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared import __version__
from shared.device import pick_device, pick_dtype
from shared.errors import ConfigError
from shared.files import claim_folder, write_atomically
from shared.pretrained import context_tokens
from student_train.data import measured, require_sources
from student_train.eval.config import EvalSettings
from student_train.eval.exact_match import draw, exact_match, questions_of
from student_train.eval.generation import take_own_attention
from student_train.eval.harness import Harness
from student_train.evaluate import evaluate
from student_train.sources import Source
from student_train.student import Student

EVAL_NAME = "eval.json"


def run_evaluation(settings: EvalSettings) -> dict[str, Any]:
    """What eval.json holds, which is written then.

    Raises:
        ConfigError: the output folder is not ours, a task is unknown, or there is nothing to ask.
        MismatchError, RecordError, DamagedDataError: model or data cannot be used; see `student_train.sources`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("eval runs in one process", next_step="start it without torchrun")
    output = Path(settings.output)
    claim_folder(output, [EVAL_NAME])
    if settings.data is not None:
        require_sources(settings.data)
    harness = Harness(settings.lm_eval, seed=settings.seed) if settings.lm_eval else None
    student = Student(
        settings.student,
        pick_device(settings.device),
        batch_tokens=settings.batch_tokens,
        packing=settings.measures,
    )
    result = {
        **_looks(settings, student, harness),
        "settings": settings.model_dump(mode="json"),
        "versions": _versions(),
    }
    write_atomically(output / EVAL_NAME, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return result


def _looks(settings: EvalSettings, student: Student, harness: Harness | None) -> dict[str, Any]:
    """The three looks, or None for those that were not asked for; the quickest to fail before the longest."""
    sources: Sequence[Source] = student.open_sources(settings.data) if settings.data else []
    limits: dict[str, Any] = {
        "context_tokens": context_tokens(settings.student),
        "compute_dtype": pick_dtype(settings.student.product_dtype) if settings.student.is_mixed else None,
    }
    evaluation = matched = tasks = questions = None
    if harness:
        harness.require_template(student.tokenizer)
    if settings.generate:
        drawn = draw(sources, settings.generate.rows, settings.seed)
        questions = questions_of(drawn, student.model, student.tokenizer, settings.generate)
    if settings.measures:
        evaluation = evaluate(student, measured(sources, lambda _: True), num_worst=settings.worst)
        assert evaluation is not None, "nobody holds signals back"
    take_own_attention(student.model)
    if settings.generate and questions:
        matched = exact_match(questions, student.model, student.tokenizer, settings.generate, **limits)
    if harness:
        tasks = harness.run(student.model, student.tokenizer, **limits)
    return {
        "evaluation": evaluation and evaluation.model_dump(mode="json"),
        "exact_match": matched and asdict(matched),
        "lm_eval": tasks,
    }


def _versions() -> dict[str, str]:
    """What computed the numbers."""
    known = {"logitferry": __version__}
    for name in ("torch", "transformers", "lm_eval"):
        try:
            known[name] = version(name)
        except ModuleNotFoundError:
            continue
    return known
