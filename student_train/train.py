"""Phase 2: the student learns from labels and, where there is a dataset, from what the teacher said.

A step is `rows_per_step` rows, cut into forward passes of at most `batch_tokens` tokens, of one rank or several.  Every
pass divides by the supervised tokens of the whole step, so the gradient does not depend on how the step was cut.

A run that is interrupted leaves a checkpoint, and goes on from the newest one when it is run again: with the same rows
in the same order, whatever the number of ranks.
"""

import json
import logging
import math
import os
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from shared.config import load_settings, settings_yaml
from shared.device import pick_device
from shared.errors import ConfigError, MismatchError, NonFiniteError, OutputError
from shared.files import claim_folder, write_atomically
from shared.interruption import Interruption, held_back
from shared.progress import Ticker, progress
from student_train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints, Progress, Trained, seed_step
from student_train.config import OptimizerSettings, TrainSettings
from student_train.data import Batch, TrainingData, find_objective
from student_train.evaluate import evaluate
from student_train.log import RunLog
from student_train.ranks import Ranks, joined_ranks
from student_train.student import Student

logger = logging.getLogger("logitferry")

MODEL_FOLDER = "model"
LOG_NAME = "log.jsonl"
CONFIG_NAME = "config.yaml"
RUN_NAME = "run.json"
MEANS = {"batch_tokens", "packing", "static_shapes", "loader_threads", "checkpoint", "device", "deterministic"}
"""Settings that say how, not what: a run is the same run with others."""
STAGE_SETTINGS = ("optimizer", "rows_per_step", "shuffle_blocks", "seed")
"""With the loss, the number of steps and the share that is held out: without these as they were, no run goes on."""


def finished_run(settings: TrainSettings) -> dict[str, Any] | None:
    """The record of this very run where it is done already; None where it is not.

    Raises:
        MismatchError: the output folder holds a model that was trained with other settings.
    """
    output = Path(settings.output)
    if not (output / MODEL_FOLDER).exists():
        return None
    trained = load_settings(TrainSettings, output / CONFIG_NAME)
    if trained.model_dump(exclude=MEANS) != settings.model_dump(exclude=MEANS):
        raise MismatchError(
            f"{output / MODEL_FOLDER} was trained with other settings, see {output / CONFIG_NAME}",
            next_step="give this run another `output`, or remove the folder",
        )
    return json.loads((output / RUN_NAME).read_text(encoding="utf-8"))


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train to the end, by as many ranks as were started; see `Trainer.run`."""
    device = pick_device(settings.device)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with joined_ranks(device) as ranks:
        return Trainer(settings, ranks).run()


class Trainer:
    """One student, its optimizer and its data; `run` trains and leaves a Hugging Face model."""

    def __init__(self, settings: TrainSettings, ranks: Ranks | None = None) -> None:
        self._settings, self._output = settings, Path(settings.output)
        self._ranks = ranks or Ranks(device=pick_device(settings.device))
        claim_folder(self._output, [CONFIG_NAME, CHECKPOINTS_FOLDER])
        if (self._output / MODEL_FOLDER).exists():
            raise ConfigError(
                f"{self._output / MODEL_FOLDER} exists: this run is finished", next_step="give another `output`"
            )
        self.objective = find_objective(settings)
        torch.manual_seed(settings.seed)
        self.student = Student(
            settings.student,
            self._ranks.device,
            batch_tokens=settings.batch_tokens,
            chunk_positions=settings.loss.chunk_positions,
            packing=settings.packing,
            static_shapes=settings.static_shapes,
        )
        self.data = TrainingData(settings, self.student, self.objective, self._ranks)
        self._steps = _num_steps(settings, self.data.num_rows)
        optimizer = make_optimizer(self.student.model, settings.optimizer)
        schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=settings.optimizer.warmup_steps,
            num_training_steps=self._steps,
            min_lr_rate=settings.optimizer.min_lr_ratio,
        )
        self._trained = Trained(model=self.student.model, optimizer=optimizer, schedule=schedule)
        self._identity = self._find_identity()
        self._checkpoints = Checkpoints(self._output, keep=settings.checkpoint.keep, ranks=self._ranks)
        self._saved_step, self._saved_s = 0, time.monotonic()

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint on.  Returns the last held-out means and where the model lies.

        Raises:
            KeyboardInterrupt: a signal came, and there is a checkpoint now.
            DamagedDataError: a shard is not what was written; not one row of it has been trained on, and there is a
                checkpoint of what was before.
            MismatchError: the newest checkpoint is of other data, another tokenizer, model or stage.
            NonFiniteError: the loss or its gradient is no number; names the rows.
        """
        with held_back() as interruption:
            done = self._resume()
            if self._ranks.is_first:
                write_atomically(self._output / CONFIG_NAME, settings_yaml(self._settings).encode())
            after, seconds = (done.step, done.seconds) if done else (None, 0.0)
            with (
                RunLog(self._output / LOG_NAME, after=after, seconds=seconds, writes=self._ranks.is_first) as log,
                progress("train", self._steps, "steps", done=after or 0, shown=self._ranks.is_first) as bar,
            ):
                waited_s = self._run_steps(after or 0, log, bar, interruption)
                return self._finish(log, waited_s / max(log.seconds - seconds, 1e-9))

    def _run_steps(self, first: int, log: RunLog, bar: Ticker, interruption: Interruption) -> float:
        """All steps that are left.  Returns how long the data were waited for."""
        waited_s = 0.0
        self._saved_step, self._saved_s = first, time.monotonic()
        with closing(self.data.batches(first, self._steps)) as batches:
            for step in range(first, self._steps + 1):
                batch, error, begin_s = None, None, 0.0
                try:
                    self._evaluate(step, log, interruption)
                    begin_s = time.monotonic()
                    batch = interruption.unless_asked(lambda: next(batches, None))
                except Exception as raised:  # whatever it is, what was done before is saved first
                    error = raised
                wait_s = time.monotonic() - begin_s
                self._save_or_stop(step, log, interruption, error)
                if batch is None:
                    break
                begin_s = time.monotonic()
                entry = self._step(batch)
                taken_s = time.monotonic() - begin_s + wait_s
                waited_s += wait_s
                speed = {"tokens_per_s": round(batch.num_tokens / taken_s, 1), "wait": round(wait_s / taken_s, 4)}
                log.write({"step": step + 1} | entry | speed | {"waste": round(batch.waste, 4)})
                bar.advance(note=" ".join(f"{key} {entry[key]:.4f}" for key in ("ce", "kd") if key in entry))
        return waited_s

    def _save_or_stop(self, step: int, log: RunLog, interruption: Interruption, error: Exception | None) -> None:
        """What has to be settled between steps, and by all ranks alike: is it time for a checkpoint, or to end?"""
        every = self._settings.checkpoint
        is_due = bool(every.every_steps) and step % (every.every_steps or 1) == 0
        if every.every_minutes and self._ranks.is_first:
            is_due |= time.monotonic() - self._saved_s >= 60 * every.every_minutes
        num_asked, num_failed, num_due = self._ranks.sums([interruption.came, error is not None, is_due])
        ends = num_asked or num_failed
        if step > self._saved_step and (ends or (num_due and step < self._steps)):
            try:
                self._save(step, log)
            except OutputError as unsaved:
                if error is None:
                    raise
                logger.warning("%s", unsaved)  # and what went wrong before it is told as well
        if error is not None:
            raise error
        if num_failed:
            raise OutputError("another rank cannot go on", next_step="see what that one says")
        if num_asked:
            interruption.hand_on()
            raise KeyboardInterrupt  # another rank was asked

    def _step(self, batch: Batch) -> dict[str, float]:
        model, ranks = self.student.model.train(), self._ranks
        seed_step(self._settings.seed, batch.step, ranks.rank)
        denominator = batch.num_positions / ranks.count
        mine = [0.0, 0.0, 0.0]
        for sums in self.student.losses(batch.passes, self.objective, denominator=denominator):
            sums.total.backward()
            mine = [a + float(b.detach()) for a, b in zip(mine, (sums.total, sums.ce, sums.kd), strict=True)]
        ranks.average_gradients_(model)
        loss, ce, kd = ranks.sums(mine)
        loss /= ranks.count
        grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), self._settings.optimizer.max_grad_norm))
        if not (grad_norm < float("inf") and loss < float("inf")):
            names = ", ".join(batch.sample_ids[:8])
            raise NonFiniteError(
                f"loss {loss} and gradient norm {grad_norm} in a step over {len(batch.sample_ids)} rows: {names}, …",
                next_step="lower optimizer.learning_rate, or look at these rows",
            )
        entry = {"loss": loss, "ce": ce / batch.num_positions}
        entry |= {"kd": kd / batch.num_positions} if self._settings.loss.kd_weight else {}
        entry |= {"lr": float(self._trained.schedule.get_last_lr()[0]), "grad_norm": grad_norm}
        self._trained.optimizer.step()
        self._trained.schedule.step()
        self._trained.optimizer.zero_grad(set_to_none=True)
        return entry | {"positions": batch.num_positions}

    def _evaluate(self, step: int, log: RunLog, interruption: Interruption) -> None:
        """Look at the held-out rows where it is time to, and it has not been done."""
        every = self._settings.evaluate_every
        is_due = step in (0, self._steps) or (every is not None and step % every == 0)
        if not is_due or step in log.evaluated or not self.data.held_out:
            return
        means = evaluate(self.student, self.data.held_out, self._ranks, interruption)
        if means is not None:
            log.evaluated[step] = asdict(means)
            log.write({"step": step, "held_out": asdict(means)})

    def _save(self, step: int, log: RunLog) -> None:
        log.sync()
        rows = self.data.rows_digest(step - 1)
        self._checkpoints.save(
            Progress(step=step, seconds=log.seconds, identity=self._identity, rows=rows), self._trained
        )
        self._saved_step, self._saved_s = step, time.monotonic()

    def _resume(self) -> Progress | None:
        checkpoint = self._checkpoints.newest()
        step = checkpoint.progress.step if checkpoint else 0
        if self._ranks.sums([step, step**2]) != [self._ranks.count * step, self._ranks.count * step**2]:
            raise OutputError(
                f"the ranks see unlike checkpoints in {self._output}, this one step {step}",
                next_step="give an `output` on a file system that all of them share",
            )
        if checkpoint is None:
            return None
        done = checkpoint.progress
        checkpoint.require_same(self._identity)
        if done.rows != self.data.rows_digest(done.step - 1):
            raise MismatchError(
                f"{checkpoint.folder}: step {done.step} would take other rows here than it took",
                next_step="go on with the release of logitferry that the run was begun with",
            )
        checkpoint.restore(self._trained)
        logger.info("goes on after step %d, from %s", done.step, checkpoint.folder)
        return done

    def _find_identity(self) -> dict[str, Any]:
        settings = self._settings.model_dump(mode="json")
        stage = {name: settings[name] for name in STAGE_SETTINGS} | {"loss": settings["loss"]}
        del stage["loss"]["chunk_positions"]
        stage |= {"steps": self._steps, "held_out": {"fraction": settings["held_out"]["fraction"]}}
        data = {str(index): each for index, each in enumerate(self.data.identity())}
        return {"dataset": data, "stage": stage} | self.student.identity()

    def _finish(self, log: RunLog, wait: float) -> dict[str, Any]:
        held_out = log.evaluated.get(self._steps)
        result = {
            "steps": self._steps,
            "rows_per_epoch": self.data.num_rows,
            "seconds": round(log.seconds, 3),
            "wait": round(wait, 4),
            "held_out": held_out,
            "data": self.data.record(),
            "model": str(self._output / MODEL_FOLDER),
        }
        error = None
        try:
            if self._ranks.is_first:
                write_atomically(self._output / RUN_NAME, json.dumps(result, indent=1).encode())
                self.student.save(self._output / MODEL_FOLDER)
        except OSError as raised:
            reason = raised.strerror or raised
            error = OutputError(f"{result['model']} cannot be written: {reason}", next_step="make room, then run again")
        self._save_or_stop(self._steps, log, Interruption(), error)  # with a checkpoint, if there is room for that
        return result


def _num_steps(settings: TrainSettings, num_rows: int) -> int:
    if settings.rows_per_step > num_rows:
        raise ConfigError(f"rows_per_step is {settings.rows_per_step}, but there are {num_rows} rows to train on")
    # Rounded up, so that every row is seen; the last step of an epoch is filled from the next.
    steps = settings.steps or math.ceil((settings.epochs or 0) * num_rows / settings.rows_per_step)
    if settings.optimizer.warmup_steps >= steps:
        raise ConfigError(f"optimizer.warmup_steps is {settings.optimizer.warmup_steps}, but there are {steps} steps")
    return steps


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
