"""Tasks of lm-evaluation-harness (EleutherAI), with the student as it is in memory.

A task is YAML that may name Python functions beside it; lm-eval imports and runs them.  That is code of the task's
folder, not of the model or the data, and whoever names the folder has to trust it.  Nothing else is let run code:
`trust_remote_code` stays off, and tasks that lm-eval calls unsafe are not confirmed.
"""

import difflib
import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from shared.errors import ConfigError
from student_train.attention import evaluating
from student_train.eval.config import LmEvalSettings

NO_FILTER = "none"


class Harness:
    """The tasks that a config names, with their data, found before a model is loaded.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown or cannot be loaded.
    """

    def __init__(self, settings: LmEvalSettings, *, seed: int) -> None:
        try:
            from lm_eval.models import huggingface  # noqa: F401  what it needs shows now
        except ImportError as error:
            raise ConfigError(
                f"lm_eval needs a package that is not installed: {error}", next_step="pip install 'logitferry[lm-eval]'"
            ) from None
        self._settings, self._seed = settings, seed
        with redirect_stdout(sys.stderr), _seeded(seed):
            self._manager, names = _find(settings)
            self._tasks = _load(self._manager, names)

    def require_template(self, tokenizer: Any) -> None:
        """Raises ConfigError where the prompts shall have a chat template and there is none."""
        if self._settings.apply_chat_template and not tokenizer.chat_template:
            raise ConfigError(
                "lm_eval.apply_chat_template: the student's tokenizer has no chat template",
                next_step="set it to false, or name a student.tokenizer that has one",
            )

    def run(
        self, model: Any, tokenizer: Any, *, context_tokens: int | None, compute_dtype: torch.dtype | None
    ) -> dict[str, Any]:
        """What lm-eval found, by task; see `found`."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        settings, seed = self._settings, self._seed
        make, simple_evaluate = cast(Any, HFLM), cast(Any, lm_eval.simple_evaluate)  # whose types say nothing
        with redirect_stdout(sys.stderr), _seeded(seed), evaluating(model):
            wrapped = make(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                max_length=context_tokens,
                mixed_precision_dtype=compute_dtype,
                trust_remote_code=False,
            )
            results = simple_evaluate(
                model=wrapped,
                tasks=self._tasks,
                task_manager=self._manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                batch_size=settings.batch_size,
                apply_chat_template=settings.apply_chat_template,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=False,
            )
        assert results is not None, "there is one process"
        return found(dict(results))


def _find(settings: LmEvalSettings) -> tuple[Any, list[str]]:
    """What knows the tasks, and their names."""
    from lm_eval.tasks import TaskManager

    folder = settings.include_path
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(f"lm_eval.include_path {folder} is no folder", next_step="check the path")
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(settings.tasks) <= set(own.all_subtasks):
            return own, settings.tasks  # to look through the thousands of lm-eval's takes 20 s
    every, names = TaskManager(include_path=folder), []
    for asked in settings.tasks:
        matched = every.match_tasks([asked])
        if not matched:
            near = difflib.get_close_matches(asked, every.all_tasks, n=1)
            where = f"lm-eval or in {folder}" if folder else "lm-eval"
            raise ConfigError(
                f"lm_eval.tasks: there is no task {asked!r} in {where}",
                next_step=f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` shows what there is",
            )
        names += [name for name in matched if name not in names]
    return every, names


def _load(manager: Any, names: list[str]) -> list[Any]:
    """The tasks and groups with their data, as lm-eval takes them."""
    try:
        loaded = manager.load(names)
    except Exception as error:  # whatever a task's YAML, its Python or its data come to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"lm_eval.tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {reason}",
            next_step="mend the task or the path of its data; data on the Hub need a network, or to be in its cache",
        ) from error
    groups = [group for name, group in loaded["groups"].items() if name in names]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)]


def found(results: dict[str, Any]) -> dict[str, Any]:
    """Every task and group with its metrics, by value and standard error; a filter stands behind the metric's name.

    An error that lm-eval does not state, or that is no number, is None.
    """
    tasks = {}
    for name, entries in results["results"].items():
        keys = [key.split(",", 1) for key in entries if "," in key]
        metrics = {
            metric if filtered == NO_FILTER else f"{metric},{filtered}": {
                "value": _number(entries[f"{metric},{filtered}"]),
                "stderr": _number(entries.get(f"{metric}_stderr,{filtered}")),
            }
            for metric, filtered in keys
            if not metric.endswith("_stderr")
        }
        counted = results.get("n-samples", {}).get(name, {})
        tasks[name] = {
            "metrics": metrics,
            "num_fewshot": results.get("n-shot", {}).get(name),
            "documents": counted.get("effective"),
            "version": results.get("versions", {}).get(name),
        }
    return tasks


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float | np.number) and math.isfinite(float(value))
    return float(value) if is_number else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """lm-eval and its tasks draw from whatever generator they find; afterwards these are where they were."""
    kept, numpy_kept, torch_kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(numpy_kept)
        torch.set_rng_state(torch_kept)
