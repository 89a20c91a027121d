"""What a training step with distillation costs beside one without, by the same student, rows and optimizer.

    python -m tests.bench.train [--vocab 49152] [--device auto] [--json FILE]

A made-up student of a hundred million parameters (random weights, tied embedding) takes steps over rows that are all
supervised, with 64 kept ids at every position.  A step is what `student-train run` does with rows it has: collating,
moving, forward and backward pass, clipping, AdamW.

- `sft`: labels alone, `kd_weight: 0`.  `kd`: cross-entropy and forward KL with a tail at T = 1, `kd_weight: 0.9`.
- `kd_t2`: the same at T = 2.  `kd_jsd`: another divergence.
- `sft_plain`: labels alone, by transformers' own loss on the logits of all tokens.

`seconds` is the median of --repeats rounds, each of which takes every kind of step once, in turn; `ratio` the median
over rounds of a step's time over that of the round's `sft`.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.batching import PaddedBatch
from shared.device import pick_device
from shared.rows import LogitRow, Positions, Row
from student_train.config import OptimizerSettings, StudentSettings
from student_train.objective import Objective
from student_train.ranks import Ranks
from student_train.student import Student
from student_train.train import make_optimizer
from tests.bench.loss import seconds_of
from tests.tiny import make_model, make_tokenizer

ROW_TOKENS, KEPT, LAYERS, HIDDEN = 257, 64, 15, 640
STEPS = {
    "sft": Objective(kd_weight=0.0),
    "kd": Objective(kd_weight=0.9),
    "kd_t2": Objective(kd_weight=0.9, temperature=2.0),
    "kd_jsd": Objective(kd_weight=0.9, divergence="jsd"),
}


def made_up_rows(num_rows: int, vocab_size: int) -> list[LogitRow]:
    random = np.random.default_rng(0)
    num_positions, stride = ROW_TOKENS - 1, vocab_size // KEPT
    rows = []
    for n in range(num_rows):
        logits = random.normal(size=(num_positions, KEPT + 1)) * 3
        logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        ids = np.arange(KEPT) * stride + random.integers(stride, size=(num_positions, KEPT))
        teacher = Positions(
            kept_counts_P=np.full(num_positions, KEPT, np.int32),
            kept_ids_E=ids.ravel().astype(np.int32),
            kept_logp_E=logp[:, :-1].ravel().astype(np.float32),
            realised_logp_P=np.zeros(num_positions, np.float32),
            entropy_P=np.ones(num_positions, np.float32),
            tail_logsum_PT=np.stack([logp[:, -1]] * 2, axis=1).astype(np.float32),
        )
        rows.append(
            LogitRow(
                sample_id=str(n),
                input_ids_L=random.integers(vocab_size, size=ROW_TOKENS).astype(np.int32),
                label_mask_L=np.arange(ROW_TOKENS) > 0,
                teacher=teacher,
            )
        )
    return rows


def _as_read(row: LogitRow, objective: Objective) -> Row:
    """As a source gives it: at the temperature of the loss, or without its teacher."""
    if not objective.kd_weight:
        return row.without_teacher()
    return replace(row, teacher=row.teacher.at_temperature(int(objective.temperature) - 1))


class Steps:
    """One student and its optimizer; every kind of step is a function without arguments."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        shape = {"hidden_size": HIDDEN, "intermediate_size": 1792, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True}
        make_tokenizer(make_model(folder, vocab_size=arguments.vocab, spread=0.1, **shape, **heads))
        self.device = pick_device(arguments.device)
        settings = StudentSettings(model=str(folder), dtype=arguments.dtype)
        self.student = Student(settings, self.device, batch_tokens=arguments.batch_tokens)
        self.student.model.train()
        self.rows = made_up_rows(arguments.rows, arguments.vocab)
        self.positions = sum(row.num_positions for row in self.rows)
        self.optimizer = make_optimizer(self.student.model, OptimizerSettings())

    def kinds(self) -> dict[str, Callable[[], None]]:
        ours = {
            name: lambda objective=objective: self.step(self.losses(objective)) for name, objective in STEPS.items()
        }
        return ours | {"sft_plain": lambda: self.step(self.plain_losses())}

    def losses(self, objective: Objective) -> Iterable[Tensor]:
        longest = max(row.num_tokens for row in self.rows)
        maker = self.student.pass_maker(objective, longest_row=longest, ranks=Ranks(device=self.device))
        passes, _ = maker.make([_as_read(row, objective) for row in self.rows])
        for sums in self.student.losses(passes, objective, denominator=float(self.positions)):
            yield sums.total

    def plain_losses(self) -> Iterable[Tensor]:
        batch = PaddedBatch.of(self.rows, self.device)
        yield self.student.model(input_ids=batch.input_ids_BL, labels=batch.input_ids_BL).loss

    def step(self, losses: Iterable[Tensor]) -> None:
        for loss in losses:
            loss.backward()
        nn.utils.clip_grad_norm_(self.student.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(steps: Steps, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    kinds = steps.kinds()
    for step in kinds.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.repeats):
        for name, step in kinds.items():
            seconds[name].append(seconds_of(step, steps.device))
    parameters = sum(parameter.numel() for parameter in steps.student.model.parameters())
    common = {
        "parameters": parameters,
        "vocab": arguments.vocab,
        "dtype": arguments.dtype,
        "positions": steps.positions,
    }
    return [
        {
            "variant": name,
            **common,
            "vocab": arguments.vocab,
            "k": KEPT,
            "seconds": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, seconds["sft"], strict=True)),
            "positions_per_s": steps.positions / statistics.median(found),
        }
        for name, found in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--rows", type=int, default=8, help=f"of {ROW_TOKENS} tokens, in each step")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="of one forward pass")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write a list with one object for each variant")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Steps(arguments, Path(scratch) / "student"), arguments)
    first = rows[0]
    print(
        f"{first['parameters'] / 1e6:.0f} million parameters, vocabulary {first['vocab']:,}, {first['dtype']}, "
        f"{first['positions']:,} positions a step"
    )
    for row in rows:
        print(f"{row['variant']:<10} {row['seconds']:8.3f} s {row['ratio']:6.3f} x sft")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
