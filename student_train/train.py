"""Phase 2: the student learns from labels and, where there is a dataset, from what the teacher said.

A step is `rows_per_step` rows, cut into forward passes of at most `batch_tokens` tokens.  Every pass divides by
the supervised tokens of the whole step, so the gradient does not depend on how the step was cut.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from shared.config import load_settings, settings_yaml
from shared.dataset import LogitDataset
from shared.device import pick_device
from shared.errors import ConfigError, MismatchError, NonFiniteError
from shared.files import claim_folder, write_atomically
from shared.progress import progress
from shared.rows import Row
from student_train.config import OptimizerSettings, TrainSettings
from student_train.evaluate import HeldOutMeans, evaluate
from student_train.objective import Objective
from student_train.ranks import mean_over_ranks
from student_train.sources import Source
from student_train.stream import Stream, is_held_out
from student_train.student import Student

MODEL_FOLDER = "model"
LOG_NAME = "log.jsonl"
CONFIG_NAME = "config.yaml"
RUN_NAME = "run.json"


def finished_run(settings: TrainSettings) -> dict[str, Any] | None:
    """The record of this very run where it is done already; None where it is not.

    Raises:
        MismatchError: the output folder holds a model that was trained with other settings.
    """
    output = Path(settings.output)
    if not (output / MODEL_FOLDER).exists():
        return None
    if load_settings(TrainSettings, output / CONFIG_NAME) != settings:
        raise MismatchError(
            f"{output / MODEL_FOLDER} was trained with other settings, see {output / CONFIG_NAME}",
            next_step="give this run another `output`, or remove the folder",
        )
    return json.loads((output / RUN_NAME).read_text(encoding="utf-8"))


class Trainer:
    """One student, its optimizer and its data; `run` trains and leaves a Hugging Face model."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._output = Path(settings.output)
        claim_folder(self._output, [CONFIG_NAME])
        if (self._output / MODEL_FOLDER).exists():
            raise ConfigError(
                f"{self._output / MODEL_FOLDER} exists: this run is finished", next_step="give another `output`"
            )
        self.objective, self.temperature_index = find_objective(settings)
        torch.manual_seed(settings.seed)
        self._device = pick_device(settings.device)
        self.student = Student(
            settings.student,
            device=self._device,
            batch_tokens=settings.batch_tokens,
            chunk_positions=settings.loss.chunk_positions,
        )
        source = self.student.open_source(settings.data)
        fraction = settings.held_out.fraction
        self._training = self._stream(source, lambda sample_id: not is_held_out(sample_id, fraction))
        self._held_out = self._open_held_out(source)
        rows_per_epoch = self._training.num_rows
        if settings.rows_per_step > rows_per_epoch:
            raise ConfigError(
                f"rows_per_step is {settings.rows_per_step}, but there are {rows_per_epoch} rows to train on"
            )
        # Rounded up, so that every row is seen; the last step of an epoch is filled from the next.
        self._steps = settings.steps or math.ceil((settings.epochs or 0) * rows_per_epoch / settings.rows_per_step)
        if settings.optimizer.warmup_steps >= self._steps:
            raise ConfigError(
                f"optimizer.warmup_steps is {settings.optimizer.warmup_steps}, but there are {self._steps} steps"
            )
        self._optimizer = make_optimizer(self.student.model, settings.optimizer)
        self._schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            self._optimizer,
            num_warmup_steps=settings.optimizer.warmup_steps,
            num_training_steps=self._steps,
            min_lr_rate=settings.optimizer.min_lr_ratio,
        )

    def run(self) -> dict[str, Any]:
        """Train to the end.  Returns the last held-out means and where the model lies.

        Raises:
            DamagedDataError: a shard is not what was written; not one row of it has been trained on.
            NonFiniteError: the loss or its gradient is no number; names the rows.
        """
        settings, every = self._settings, self._settings.evaluate_every
        self._output.mkdir(parents=True, exist_ok=True)
        write_atomically(self._output / CONFIG_NAME, settings_yaml(settings).encode())
        begin_s = time.monotonic()
        with (
            (self._output / LOG_NAME).open("w", encoding="utf-8") as log,
            progress("train", self._steps, "steps") as bar,
        ):

            def write(entry: dict[str, Any]) -> None:
                log.write(json.dumps(entry | {"elapsed_s": round(time.monotonic() - begin_s, 3)}) + "\n")
                log.flush()

            means = self._evaluate(0, write)
            for step, rows in zip(
                range(1, self._steps + 1), self._training.batches(settings.rows_per_step), strict=False
            ):
                entry = self._step(rows)
                write({"step": step} | entry)
                if step == self._steps or (every and step % every == 0):
                    means = self._evaluate(step, write)
                bar.advance(note=" ".join(f"{key} {entry[key]:.4f}" for key in ("ce", "kd") if key in entry))
        result = {
            "steps": self._steps,
            "rows_per_epoch": self._training.num_rows,
            "seconds": round(time.monotonic() - begin_s, 3),
            "held_out": asdict(means) if means else None,
            "data": self._training.source.identity(),
            "model": str(self._output / MODEL_FOLDER),
        }
        write_atomically(self._output / RUN_NAME, json.dumps(result, indent=1).encode())
        self.student.save(self._output / MODEL_FOLDER)
        return result

    def _step(self, rows: list[Row]) -> dict[str, float]:
        begin_s = time.monotonic()
        model = self.student.model.train()
        denominator = mean_over_ranks(float(sum(row.num_positions for row in rows)), self._device)
        loss = ce = kd = 0.0
        for sums in self.student.losses(
            rows, self.objective, temperature_index=self.temperature_index, denominator=denominator
        ):
            sums.total.backward()
            loss, ce, kd = loss + float(sums.total.detach()), ce + float(sums.ce), kd + float(sums.kd)
        grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), self._settings.optimizer.max_grad_norm))
        if not (grad_norm < float("inf") and loss < float("inf")):
            names = ", ".join(row.sample_id for row in rows[:8])
            raise NonFiniteError(
                f"loss {loss} and gradient norm {grad_norm} in a step over {len(rows)} rows: {names}, …",
                next_step="lower optimizer.learning_rate, or look at these rows",
            )
        entry = {"loss": loss, "ce": ce / denominator}
        entry |= {} if self.temperature_index is None else {"kd": kd / denominator}
        entry |= {"lr": float(self._schedule.get_last_lr()[0]), "grad_norm": grad_norm, "positions": denominator}
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(row.num_tokens for row in rows)
        return entry | {"tokens_per_s": round(num_tokens / (time.monotonic() - begin_s), 1)}

    def _evaluate(self, step: int, write: Callable[[dict[str, Any]], None]) -> HeldOutMeans | None:
        if self._held_out is None:
            return None
        means = evaluate(self.student, self._held_out)
        write({"step": step, "held_out": asdict(means)})
        return means

    def _stream(self, source: Source, takes: Callable[[str], bool]) -> Stream:
        settings = self._settings
        return Stream(source=source, takes=takes, seed=settings.seed, shuffle_blocks=settings.shuffle_blocks)

    def _open_held_out(self, training: Source) -> Stream | None:
        settings = self._settings.held_out
        if settings.data is not None:
            stream = self._stream(self.student.open_source(settings.data), lambda _: True)
        elif settings.fraction:
            stream = self._stream(training, lambda sample_id: is_held_out(sample_id, settings.fraction))
        else:
            return None
        if not stream.num_rows:
            raise ConfigError("no row is held out", next_step="raise held_out.fraction, or leave held_out away")
        return stream


def find_objective(settings: TrainSettings) -> tuple[Objective, int | None]:
    """What the config asks for and the place of its temperature among the dataset's, before any model is loaded.

    None where the teacher is left out.

    Raises:
        MismatchError: the dataset does not hold what this loss needs.
    """
    if not settings.loss.kd_weight:
        return settings.loss.objective(is_sampled=False), None
    folder, temperature = str(settings.data.dataset), settings.loss.temperature
    manifest = LogitDataset.open(folder).manifest
    try:
        objective = settings.loss.objective(is_sampled=not manifest.row_format.has_tails)
    except ValueError as error:
        raise MismatchError(
            f"{folder} was kept by {manifest.keep['method']}, and the loss does not fit it: {error}",
            next_step="train with loss: {divergence: forward_kl, temperature: 1} and no loss.tail, "
            "or dump with keep.method: topk",
        ) from None
    if temperature not in manifest.temperatures:
        raise MismatchError(
            f"loss.temperature {temperature:g} is not among the {manifest.temperatures} of {folder}: "
            "the teacher's tail is not known there",
            next_step="train at a declared temperature, or dump again with this one under `temperatures`",
        )
    return objective, manifest.temperatures.index(temperature)


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
