"""What the offline path is measured against: a live teacher with its full vocabulary, and RS-KD's draws.

Live: the teacher computes its logits beside the student in every step and the loss is dense, KL over all V ids, written
here in plain PyTorch.  Rows, their order, optimizer and schedule are those of `student-train run`.  Nothing of that is
stored, and it needs both models on one machine: it is the ceiling, not a recipe.

RS-KD (arXiv 2503.16870): of every position so many draws with replacement, each worth 1/draws.  They are drawn once and
stored in a dataset like any other, in the columns of `keep.method: threshold`, so that bytes and training compare.
"""

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.config import load_settings
from shared.models import load_model
from shared.models_config import ModelSettings
from shared.rows import Positions, Row
from student_train.attention import settle_attention
from student_train.config import TrainSettings
from student_train.measures import NAMES, Measures
from student_train.objective import Objective
from student_train.passes import ForwardPass
from student_train.train import Trainer, finished_run
from teacher_dump.config import DumpSettings
from teacher_dump.dump import run_dump
from teacher_dump.engines import open_engine
from teacher_dump.keep import TopK

CPU = torch.device("cpu")


def train_live(config: str, teacher: str, kd_weight: float) -> None:
    """A run of `student-train run` on text, its loss mixed with a live teacher's."""
    settings = load_settings(TrainSettings, config)
    if finished_run(settings):
        return
    trainer = Trainer(settings)
    student = trainer.student
    model: Any = load_model(ModelSettings(model=teacher), dtype=torch.float32, device=CPU)
    attention = settle_attention(model, "auto", is_static=False)

    def gradients(
        passes: Sequence[ForwardPass], objective: Objective, *, denominator: float
    ) -> tuple[Tensor, list[Measures]]:
        student.model.train()
        loss, found = torch.zeros(()), []
        for each in passes:
            with torch.no_grad():
                logp_NV = model.lm_head(each.hidden_at_positions(model.base_model, attention)).log_softmax(dim=1)
            hidden_ND = each.hidden_at_positions(student.model.base_model, student.attention)
            logq_NV = student.model.lm_head(hidden_ND).log_softmax(dim=1)
            ce_N = -logq_NV.gather(1, each.targets.label_N[:, None]).squeeze(1)
            kd_N = (logp_NV.exp() * (logp_NV - logq_NV)).sum(dim=1)
            total = ((1 - kd_weight) * ce_N + kd_weight * kd_N).sum() / denominator
            total.backward()
            loss += total.detach()
            values_MN = torch.zeros(len(NAMES), len(ce_N))
            values_MN[NAMES.index("ce")] = ce_N.detach()
            values_MN[NAMES.index("is_right")] = (logq_NV.argmax(dim=1) == each.targets.label_N).float()
            found.append(Measures(values_MN=values_MN, weight_N=each.targets.weight_N))
        return loss, found

    student.gradients = gradients
    trainer.run()


def dump_draws(config: str, overrides: Sequence[str], draws: int) -> None:
    """A dump whose kept ids are draws with replacement; the config says `keep.method: threshold`."""

    @contextmanager
    def load(settings: Any, identity: Any, _rule: Any, temperatures: Any, *, longest_row: int) -> Iterator[Any]:
        everything = TopK(k=identity.vocab_size, min_prob=0.0, always_ids=())
        with open_engine(settings, identity, everything, temperatures, longest_row=longest_row) as engine:
            yield Drawing(engine, draws)

    run_dump(load_settings(DumpSettings, config, tuple(overrides)), load=load)


class Drawing:
    """An engine that says of each position what was drawn of all that another one says."""

    def __init__(self, engine: Any, draws: int) -> None:
        self._engine, self._draws = engine, draws

    def score(self, units: Iterable[Sequence[Row]]) -> Generator[list[Positions]]:
        rows: list[Sequence[Row]] = []

        def remembered() -> Iterator[Sequence[Row]]:
            for each in units:
                rows.append(each)
                yield each

        for scored in self._engine.score(remembered()):
            yield [drawn(row, positions, self._draws) for row, positions in zip(rows.pop(0), scored, strict=True)]


def drawn(row: Row, whole: Positions, draws: int) -> Positions:
    """Of positions with all ids kept; the same draws for the same row, always."""
    seed = int.from_bytes(hashlib.sha256(row.sample_id.encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    counts, ids, logs = [], [], []
    ends = np.cumsum(whole.kept_counts_P)
    for begin, end in zip(ends - whole.kept_counts_P, ends, strict=True):
        p = np.exp(whole.kept_logp_E[begin:end].astype(np.float64))
        times = rng.multinomial(draws, p / p.sum())
        hit = times > 0
        counts.append(int(hit.sum()))
        ids.append(whole.kept_ids_E[begin:end][hit])
        logs.append(np.log(times[hit] / draws).astype(np.float32))
    return Positions(
        kept_counts_P=np.array(counts, np.int32),
        kept_ids_E=np.concatenate(ids),
        kept_logp_E=np.concatenate(logs),
        realised_logp_P=whole.realised_logp_P,
        entropy_P=whole.entropy_P,
        tail_logsum_PT=np.zeros((whole.num_positions, 0), np.float32),
    )
