"""Phase 2: the student learns from labels and, where there is a dataset, from what the teacher said.

A step is `rows_per_step` rows, cut into forward passes of at most `batch_tokens` tokens.  Every pass divides by
the supervised tokens of the whole step, so the gradient does not depend on how the step was cut.
"""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from shared.batching import PaddedBatch, batches_by_length
from shared.config import settings_yaml
from shared.device import pick_device, pick_dtype
from shared.errors import ConfigError, MismatchError, NonFiniteError
from shared.files import sync_folder, write_atomically
from shared.models import context_tokens, load_model, load_tokenizer, output_head, split_model
from shared.progress import progress
from shared.rows import Row
from student_train.collate import targets_of
from student_train.config import OptimizerSettings, TrainSettings
from student_train.fused_linear import LossSums, fused_linear_loss
from student_train.loss import Objective
from student_train.stream import DatasetSource, Source, Stream, is_held_out, open_source, source_identity

MODEL_FOLDER = "model"
LOG_NAME = "log.jsonl"
CONFIG_NAME = "config.yaml"
RUN_NAME = "run.json"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training rows, and held-out rows where there are any."""

    training: Stream
    held_out: Stream | None


@dataclass(kw_only=True)
class Means:
    """Means over supervised tokens: cross-entropy and, with a teacher, forward KL at T = 1, in nats."""

    positions: int = 0
    ce: float = 0.0
    kl: float | None = None


class Trainer:
    """One student, its optimizer and its data; `run` trains and leaves a Hugging Face model."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._output = Path(settings.output)
        if (self._output / MODEL_FOLDER).exists():
            raise ConfigError(
                f"{self._output / MODEL_FOLDER} exists: this run is finished",
                next_step="give this run another output, or remove the folder",
            )
        torch.manual_seed(settings.seed)
        self._device = pick_device(settings.device)
        self._tokenizer = load_tokenizer(settings.student)
        self._model = load_model(settings.student, dtype=pick_dtype(settings.student.dtype), device=self._device)
        self._body, head = split_model(self._model)
        self._data = self._open_data(head.vocab_size)
        self._objective = Objective(kd_weight=settings.loss.kd_weight, temperature=settings.loss.temperature)
        self._tail_index = self._find_tail() if settings.loss.kd_weight else None
        rows_per_epoch = self._data.training.num_rows
        steps = settings.steps or max(1, round((settings.epochs or 0) * rows_per_epoch / settings.rows_per_step))
        self._steps: int = steps
        self._optimizer = make_optimizer(self._model, settings.optimizer)
        self._schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            self._optimizer,
            num_warmup_steps=settings.optimizer.warmup_steps,
            num_training_steps=steps,
            min_lr_rate=settings.optimizer.min_lr_ratio,
        )

    def run(self) -> dict[str, Any]:
        """Train to the end.  Returns the last held-out means and where the model lies."""
        settings = self._settings
        self._output.mkdir(parents=True, exist_ok=True)
        write_atomically(self._output / CONFIG_NAME, settings_yaml(settings).encode())
        begin_s = time.monotonic()
        means: Means | None = None
        with (
            (self._output / LOG_NAME).open("w", encoding="utf-8") as log,
            progress("train", self._steps, "steps") as bar,
        ):
            batches = self._data.training.batches(settings.rows_per_step)
            for step in range(self._steps + 1):
                is_last = step == self._steps
                if is_last or step == 0 or (settings.evaluate_every and step % settings.evaluate_every == 0):
                    means = self._evaluate()
                    if means is not None:
                        _write_line(log, {"step": step, "held_out": vars(means)})
                if is_last:
                    break
                entry = self._step(next(batches))
                _write_line(log, {"step": step + 1, **entry, "elapsed_s": round(time.monotonic() - begin_s, 3)})
                bar.advance(note=" ".join(f"{key} {entry[key]:.4f}" for key in ("ce", "kl") if key in entry))
        result = {
            "steps": self._steps,
            "rows_per_epoch": self._data.training.num_rows,
            "seconds": round(time.monotonic() - begin_s, 3),
            "held_out": vars(means) if means else None,
            "data": source_identity(self._data.training.source, settings.data),
            "model": str(self._output / MODEL_FOLDER),
        }
        write_atomically(self._output / RUN_NAME, json.dumps(result, indent=1).encode())
        self._save_model()
        return result

    def _step(self, rows: list[Row]) -> dict[str, float]:
        begin_s = time.monotonic()
        denominator = float(sum(row.num_positions for row in rows))
        ce = kl = loss = 0.0
        self._model.train()
        for sums in self._forward(rows, self._objective, self._tail_index, denominator):
            sums.total.backward()
            loss, ce, kl = loss + float(sums.total.detach()), ce + float(sums.ce), kl + float(sums.kl)
        grad_norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.optimizer.max_grad_norm))
        if not (grad_norm < float("inf") and loss < float("inf")):
            names = ", ".join(row.sample_id for row in rows[:8])
            raise NonFiniteError(
                f"loss {loss} and gradient norm {grad_norm} in a step over {len(rows)} rows: {names}, …",
                next_step="lower optimizer.learning_rate, or look at these rows",
            )
        entry = {"loss": loss, "ce": ce / denominator, "lr": self._schedule.get_last_lr()[0], "grad_norm": grad_norm}
        if self._tail_index is not None:
            entry["kl"] = kl / denominator
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        tokens = sum(row.num_tokens for row in rows)
        return entry | {"positions": denominator, "tokens_per_s": round(tokens / (time.monotonic() - begin_s), 1)}

    def _forward(
        self, rows: Sequence[Row], objective: Objective, tail_index: int | None, denominator: float
    ) -> Iterable[LossSums]:
        """One pass after the other, so that only one lives at a time."""
        head = output_head(self._model)
        for indices in batches_by_length([row.num_tokens for row in rows], self._settings.batch_tokens):
            batch = [rows[index] for index in indices]
            hidden_ND = PaddedBatch.of(batch, self._device).hidden_at_positions(self._body)
            targets = targets_of(batch, tail_index=tail_index, device=self._device)
            yield fused_linear_loss(
                hidden_ND,
                head,
                targets,
                objective,
                denominator=denominator,
                chunk_positions=self._settings.loss.chunk_positions,
            )

    @torch.no_grad()
    def _evaluate(self) -> Means | None:
        """Means over all held-out rows, in the order of their source."""
        stream = self._data.held_out
        if stream is None:
            return None
        has_teacher = isinstance(stream.source, DatasetSource)
        means, rows = Means(kl=0.0 if has_teacher else None), list(stream.in_order())
        objective = Objective(kd_weight=0.0)
        self._model.eval()
        for sums in self._forward(rows, objective, 0 if has_teacher else None, 1.0):
            means.ce += float(sums.ce)
            means.kl = means.kl + float(sums.kl) if means.kl is not None else None
        means.positions = sum(row.num_positions for row in rows)
        means.ce /= means.positions
        means.kl = means.kl / means.positions if means.kl is not None else None
        return means

    def _open_data(self, vocab_size: int) -> Data:
        settings, context = self._settings, context_tokens(self._settings.student)
        fraction, own = settings.held_out.fraction, settings.held_out.data

        def stream(source: Source, takes: Any) -> Stream:
            return Stream(source=source, takes=takes, seed=settings.seed, shuffle_blocks=settings.shuffle_blocks)

        source = open_source(settings.data, self._tokenizer, vocab_size=vocab_size, context_tokens=context)
        training = stream(source, lambda sample_id: not is_held_out(sample_id, fraction))
        held_out = None
        if own is not None:
            own_source = open_source(own, self._tokenizer, vocab_size=vocab_size, context_tokens=context)
            held_out = stream(own_source, lambda _: True)
        elif fraction:
            held_out = stream(source, lambda sample_id: is_held_out(sample_id, fraction))
        if held_out is not None and not held_out.num_rows:
            raise ConfigError("no row is held out", next_step="raise held_out.fraction, or leave held_out away")
        return Data(training=training, held_out=held_out)

    def _find_tail(self) -> int:
        source, temperature = self._data.training.source, self._settings.loss.temperature
        assert isinstance(source, DatasetSource)
        declared = source.dataset.manifest.temperatures
        if temperature not in declared:
            raise MismatchError(
                f"loss.temperature {temperature:g} is not among the dataset's {declared}; its tail is not known",
                next_step="train at a declared temperature, or dump again with this one under `temperatures`",
            )
        return declared.index(temperature)

    def _save_model(self) -> None:
        """Written aside and renamed: a folder called `model` is a whole model."""
        aside = self._output / f".{MODEL_FOLDER}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        self._model.save_pretrained(aside)
        self._tokenizer.save_pretrained(aside)
        aside.rename(self._output / MODEL_FOLDER)
        sync_folder(self._output)


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def _write_line(log: Any, entry: dict[str, Any]) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()
