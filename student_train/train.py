"""Phase 2: the student learns from labels and, where there is a dataset, from what the teacher said.

A step is `rows_per_step` rows, cut into forward passes of at most `batch_tokens` tokens, of one rank or several.  Every
pass divides by the supervised tokens of the whole step, so the gradient does not depend on how the step was cut.

A run that is interrupted leaves a checkpoint, and goes on from the newest one when it is run again: with the same rows
in the same order, whatever the number of ranks.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from shared.amounts import size
from shared.config import load_settings, settings_yaml
from shared.device import (
    free_cached_memory,
    host_peak_bytes,
    is_out_of_memory,
    peak_bytes,
    peak_flops,
    pick_device,
    pick_dtype,
)
from shared.errors import ConfigError, DivergedError, MismatchError, NoMemoryError, NonFiniteError, OutputError
from shared.files import alone_in, claim_folder, write_atomically
from shared.fingerprint import sha256_of_json
from shared.interruption import Interruption, held_back
from shared.pretrained import weights_digest
from shared.progress import Ticker, progress
from student_train.checkpoint import Checkpoints, Progress, Trained, flat
from student_train.config import TrainSettings
from student_train.data import Batch, TrainingData, find_objective, num_steps, require_data, require_same_data
from student_train.evaluate import evaluate
from student_train.lineage import LINEAGE_NAME, Lineage, writer_name
from student_train.log import RunLog
from student_train.ranks import Ranks, joined_ranks
from student_train.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_NAME,
    DROPPED_NAME,
    HELD_OUT_NAME,
    LOG_NAME,
    MODEL_FOLDER,
    RUN_NAME,
)
from student_train.sinks import open_sinks
from student_train.step import Stepper, make_optimizer
from student_train.student import Student

logger = logging.getLogger("logitferry")

MEANS: Any = {
    "student": {"attention", "gradient_checkpointing", "compile"},
    **dict.fromkeys(("batch_tokens", "packing", "static_shapes", "loader_threads", "parallel"), True),
    **dict.fromkeys(("checkpoint", "anomaly", "log", "device", "deterministic"), True),
}
"""Settings that say how, not what: a run is the same run with others."""
STAGE_SETTINGS = ("optimizer", "rows_per_step", "shuffle_blocks", "seed")
"""With the loss, the number of steps and the share that is held out: without these as they were, no run goes on."""


def finished_run(settings: TrainSettings) -> dict[str, Any] | None:
    """The record of this very run where it is done already; None where it is not.

    Raises:
        MismatchError: the output folder holds a model that was trained with other settings or on other data.
    """
    output = Path(settings.output)
    if not (output / MODEL_FOLDER).exists():
        return None
    trained = load_settings(TrainSettings, output / CONFIG_NAME)
    was, now = (flat(each.model_dump(mode="json", exclude=MEANS)) for each in (trained, settings))
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if changed:
        differences = "".join(f"\n  {key}: was {was.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise MismatchError(
            f"{output / MODEL_FOLDER} was trained with other settings, see {output / CONFIG_NAME}{differences}",
            next_step="give this run another `output`, or remove the folder",
        )
    _require_same_start(settings, output / MODEL_FOLDER)
    record = json.loads((output / RUN_NAME).read_text(encoding="utf-8"))
    require_same_data(settings, record.get("data", []))
    return record


def _require_same_start(settings: TrainSettings, model: Path) -> None:
    """A stage that is done stays done only while the one that it came of is what it was.

    Raises:
        MismatchError: where it began there are other weights now.
    """
    start = Path(settings.student.model)
    if not start.is_dir() or not (model / LINEAGE_NAME).is_file():
        return
    begun = Lineage.read(model / LINEAGE_NAME)
    if (now := writer_name({"weights_sha256": weights_digest(start)})) not in begun:
        raise MismatchError(
            f"{model} has not come of {start} as it is now: those weights are {now}, it came of {', '.join(begun)}",
            next_step=f"remove {model.parent} to train it again, or put the earlier weights back",
        )


def train(runs: Sequence[TrainSettings]) -> list[dict[str, Any]]:
    """Train one after the other to its end, by as many ranks as were started; see `Trainer.run`.

    Those that are finished are not repeated.  All of them take the device of the first.
    """
    if all(records := [finished_run(settings) for settings in runs]):
        return [record for record in records if record]
    for settings, record in zip(runs, records, strict=True):
        if record is None and len(runs) > 1:
            require_data(settings)  # not after the stages before it have taken a night
    device = pick_device(runs[0].device)
    with joined_ranks(device) as ranks:
        return [finished_run(settings) or _train(settings, ranks) for settings in runs]


def _train(settings: TrainSettings, ranks: Ranks) -> dict[str, Any]:
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic)
    logger.info("%s: begins with %s", settings.output, settings.student.model)
    try:
        return Trainer(settings, ranks).run()
    finally:
        free_cached_memory(ranks.device)


class Trainer:
    """One student, its optimizer and its data; `run` trains and leaves a Hugging Face model."""

    def __init__(self, settings: TrainSettings, ranks: Ranks | None = None) -> None:
        self._settings, self._output = settings, Path(settings.output)
        self._ranks = ranks or Ranks(device=pick_device(settings.device))
        claim_folder(self._output, [CONFIG_NAME, CHECKPOINTS_FOLDER])
        self._require_unfinished()
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
        self._steps = num_steps(settings, self.data.num_rows)
        self.student.spread(settings.parallel, self._ranks)
        optimizer = make_optimizer(self.student.model, settings.optimizer)
        schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=settings.optimizer.warmup_steps,
            num_training_steps=self._steps,
            min_lr_rate=settings.optimizer.min_lr_ratio,
        )
        self._trained = Trained(model=self.student.model, optimizer=optimizer, schedule=schedule)
        self._identity = self._find_identity()
        self._lineage = Lineage.of(settings.student.model, self._identity["model"])
        self._checkpoints = Checkpoints(self._output, keep=settings.checkpoint.keep, ranks=self._ranks)
        self._stepper = Stepper(settings, self.student, self.objective, self._trained, self._ranks)
        self._peak_flops = self._find_peak_flops()
        self._saved_step, self._saved_s = 0, time.monotonic()

    def _find_peak_flops(self) -> float | None:
        """Of all ranks' devices together; None where it is not known."""
        stated, dtype = self._settings.log.peak_tflops, pick_dtype(self._settings.student.product_dtype)
        own = peak_flops(self._ranks.device, dtype) if stated is None else stated * 1e12
        return None if own is None else own * self._ranks.count

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint on.  Returns the last held-out means and where the model lies.

        Raises:
            KeyboardInterrupt: a signal came, and there is a checkpoint now.
            DamagedDataError: a shard is not what was written; not one row of it has been trained on, and there is a
                checkpoint of what was before.
            MismatchError: the newest checkpoint is of other data, another tokenizer, model or stage.
            NonFiniteError, DivergedError: the loss or its gradient is no number, or a spike; names the rows, and there
                is a checkpoint of what was before.
        """
        self._require_agreement()
        with self._alone(), held_back() as interruption:
            done = self._resume()
            if self._ranks.is_first:
                write_atomically(self._output / CONFIG_NAME, settings_yaml(self._settings).encode())
                self._say_what_is_dropped()
            after, seconds = (done.step, done.seconds) if done else (None, 0.0)
            sinks = open_sinks(self._settings, after=after) if self._ranks.is_first else []
            with (
                RunLog(
                    self._output / LOG_NAME, after=after, seconds=seconds, writes=self._ranks.is_first, sinks=sinks
                ) as log,
                progress("train", self._steps, "steps", done=after or 0, shown=self._ranks.is_first) as bar,
            ):
                waited_s = self._run_steps(after or 0, log, bar, interruption)
                return self._finish(log, waited_s / max(log.seconds - seconds, 1e-9))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes there meanwhile; the first rank sees to it, for all of them.

        Raises:
            ConfigError: one does, or it has finished the run while this one got ready.
            OutputError: the same, on the other ranks.
        """
        error = None
        with ExitStack() as stack:
            try:
                if self._ranks.is_first:
                    stack.enter_context(alone_in(self._output))
                    self._require_unfinished()
            except ConfigError as raised:
                error = raised
            (num_failed,) = self._ranks.sums([error is not None])
            if error is not None:
                raise error
            if num_failed:
                raise OutputError("another rank cannot go on", next_step="see what that one says")
            yield

    def _require_unfinished(self) -> None:
        if (self._output / MODEL_FOLDER).exists():
            raise ConfigError(
                f"{self._output / MODEL_FOLDER} exists: this run is finished", next_step="give another `output`"
            )

    def _require_agreement(self) -> None:
        """All ranks train the same run.

        Raises:
            MismatchError: they see unlike data, scores, models or settings.
        """
        said = self._ranks.gathered(sha256_of_json([self._identity, self.data.rows_digest(0)]).encode())
        if len(set(said)) > 1:
            raise MismatchError(
                "the ranks see unlike data, scores, models or settings",
                next_step="give all of them the same config and files, on a file system that they share",
            )

    def _say_what_is_dropped(self) -> None:
        """Which rows the curriculum leaves out, and why."""
        lines = [json.dumps({"sample_id": name, "reason": reason}) + "\n" for name, reason in self.data.dropped()]
        if lines:
            write_atomically(self._output / DROPPED_NAME, "".join(lines).encode())

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
                try:
                    entry = self._step(batch)
                except (NonFiniteError, DivergedError) as error:  # on all ranks alike
                    self._save_or_stop(step, log, interruption, error)
                    raise
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self._give_up(step, log, interruption, error)
                taken_s = time.monotonic() - begin_s + wait_s
                waited_s += wait_s
                log.write({"step": step + 1} | entry | self._speed(batch, taken_s, wait_s))
                bar.advance(note=" ".join(f"{key} {entry[key]:.4f}" for key in ("ce", "kd") if key in entry))
        return waited_s

    def _give_up(self, step: int, log: RunLog, interruption: Interruption, error: Exception) -> NoReturn:
        """For want of memory.  Other ranks are somewhere in the middle of a step, so that only one alone can save."""
        peak = size(peak_bytes(self._ranks.device) or host_peak_bytes())
        short = NoMemoryError(
            f"step {step + 1}: {self._ranks.device} has no memory left, at a peak of {peak}: "
            f"{str(error).splitlines()[0]}",
            next_step="lower batch_tokens, or set student.gradient_checkpointing: true; then run the same command "
            "again: it goes on; `student-train estimate` says what fits",
        )
        self._trained.optimizer.zero_grad(set_to_none=True)
        free_cached_memory(self._ranks.device)
        if self._ranks.count == 1 and not self._stepper.is_changing:  # half a step is nothing to go on from
            self._save_or_stop(step, log, interruption, short)
        raise short from error

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

    def _step(self, batch: Batch) -> dict[str, Any]:
        return self._stepper.take(batch) | self._lineage.staleness(batch.sources, batch.step)

    def _speed(self, batch: Batch, taken_s: float, wait_s: float) -> dict[str, float]:
        """What the step took; memory is the most that this process has had."""
        flops = self.student.flops.of_step(batch.row_tokens, batch.num_positions)
        return {
            "tokens_per_s": round(batch.num_tokens / taken_s, 1),
            **({} if self._peak_flops is None else {"mfu": round(flops / taken_s / self._peak_flops, 4)}),
            "wait": round(wait_s / taken_s, 4),
            "waste": round(batch.waste, 4),
            "peak_bytes": peak_bytes(self._ranks.device) or host_peak_bytes(),
        }

    def _evaluate(self, step: int, log: RunLog, interruption: Interruption) -> None:
        """Look at the held-out rows where it is time to, and it has not been done."""
        every = self._settings.evaluate_every
        is_due = step in (0, self._steps) or (every is not None and step % every == 0)
        if not is_due or step in log.evaluated or not self.data.held_out:
            return
        found = evaluate(self.student, self.data.held_out, self._ranks, interruption, step=step)
        if found is not None:
            if self._ranks.is_first:
                found.write(self._output / HELD_OUT_NAME)
            log.evaluated[step] = found.means.model_dump()  # what is in the log is not looked at again
            log.write({"step": step, "held_out": log.evaluated[step]})

    def _save(self, step: int, log: RunLog) -> None:
        log.sync()
        progress = Progress(
            step=step,
            seconds=log.seconds,
            identity=self._identity,
            rows=self.data.rows_digest(step - 1),
            norms=self._stepper.anomalies.norms,
            skipped=self._stepper.anomalies.skipped,
        )
        self._checkpoints.save(progress, self._trained)
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
        self._stepper.anomalies.norms, self._stepper.anomalies.skipped = done.norms, done.skipped
        logger.info("goes on after step %d, from %s", done.step, checkpoint.folder)
        return done

    def _find_identity(self) -> dict[str, Any]:
        settings = self._settings.model_dump(mode="json")
        stage = {name: settings[name] for name in STAGE_SETTINGS} | {"loss": settings["loss"]}
        del stage["loss"]["chunk_positions"]
        if not stage["loss"]["agreement"]:  # of which earlier checkpoints know nothing
            del stage["loss"]["agreement"]
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
            leave = partial(self._lineage.leave, steps=self._steps)
            self.student.save(self._output / MODEL_FOLDER, self._ranks, leave)
        except Exception as raised:  # safetensors has errors of its own for a disk that is full
            reason = getattr(raised, "strerror", None) or raised
            error = OutputError(f"{result['model']} cannot be written: {reason}", next_step="make room, then run again")
        self._save_or_stop(self._steps, log, Interruption(), error)  # with a checkpoint, if there is room for that
        return result
