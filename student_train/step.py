"""An optimizer's step: the gradient of its rows, a look at whether to take it, and what there is to say of it."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from student_train.anomaly import Anomalies, RowLoss, worst_rows
from student_train.checkpoint import Trained, seed_step
from student_train.config import OptimizerSettings, TrainSettings
from student_train.data import Batch
from student_train.measures import Measures, step_numbers
from student_train.objective import Objective
from student_train.ranks import Ranks
from student_train.student import Student

logger = logging.getLogger("logitferry")


class Stepper:
    """Takes the steps of a run, by all ranks together."""

    def __init__(
        self, settings: TrainSettings, student: Student, objective: Objective, trained: Trained, ranks: Ranks
    ) -> None:
        self._settings, self._student, self._objective = settings, student, objective
        self._trained, self._ranks = trained, ranks
        self.anomalies = Anomalies(settings.anomaly)
        self.is_changing = False
        """Whether the weights and moments may be those of half a step."""

    def take(self, batch: Batch) -> dict[str, Any]:
        """One step, and its line of the log.

        Raises:
            NonFiniteError, DivergedError: on all ranks alike, and the weights are as they were.
        """
        seed_step(self._settings.seed, batch.step, self._ranks.rank)
        mine, measures = self._student.gradients(
            batch.passes, self._objective, denominator=batch.weight / self._ranks.count
        )
        sums = torch.stack([each.sums() for each in measures]).cpu().double().sum(dim=0)
        loss, *sums = self._ranks.sums([float(mine), *sums.tolist()])
        loss /= self._ranks.count
        grad_norm = self._clipped_norm()
        numbers = step_numbers(sums, self._objective)
        entry: dict[str, Any] = {"loss": loss} | {name: numbers.pop(name) for name in ("ce", "kd") if name in numbers}
        entry |= {"lr": float(self._trained.schedule.get_last_lr()[0]), "grad_norm": grad_norm}
        entry |= {"positions": batch.num_positions} | numbers
        fault = self.anomalies.fault(loss, grad_norm)
        if fault is None:
            self.is_changing = True
            self._trained.optimizer.step()
            self.is_changing = False
        else:
            entry["anomaly"] = self._skip(batch, fault, measures)
        self._trained.schedule.step()  # whatever came of it: a rate belongs to a step's number
        self._trained.optimizer.zero_grad(set_to_none=True)
        return entry

    def _skip(self, batch: Batch, fault: str, measures: Sequence[Measures]) -> dict[str, Any]:
        rows = self.worst_rows(batch, measures)
        try:
            self.anomalies.skip_or_stop(batch.step + 1, fault, rows)
        finally:
            self._trained.optimizer.zero_grad(set_to_none=True)
        if self._ranks.is_first:
            logger.warning("step %d is skipped: %s", batch.step + 1, fault)
        return {"reason": fault, "skipped": True, "rows": [asdict(row) for row in rows]}

    def _clipped_norm(self) -> float:
        """The norm of the whole gradient, which is then no longer than it may be."""
        norm = nn.utils.clip_grad_norm_(self._student.model.parameters(), self._settings.optimizer.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def worst_rows(self, batch: Batch, measures: Sequence[Measures]) -> list[RowLoss]:
        """Of all ranks; all of them call it."""
        num_rows = len(batch.sample_ids)
        sums_3R = np.zeros((3, num_rows))
        for of, each in zip(batch.passes, measures, strict=True):
            row_N = np.repeat(of.rows, of.positions).astype(np.int64)
            for sums_R, values_N in zip(sums_3R, (each.of("ce"), each.of("kd"), each.weight_N), strict=True):
                np.add.at(sums_R, row_N, values_N.cpu().numpy()[: len(row_N)])
        ce_R, kd_R, count_R = np.array(self._ranks.sums(sums_3R.ravel().tolist())).reshape(3, num_rows)
        return worst_rows(batch.sample_ids, (ce_R / count_R).tolist(), (kd_R / count_R).tolist())


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters are matrices alone
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
