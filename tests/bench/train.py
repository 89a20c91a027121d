"""What a training step with distillation costs beside one without, by the same student, rows and optimizer.

    python -m tests.bench.train [--vocab 49152] [--device auto] [--json FILE]
    python -m tests.bench.train --shape 1b --vocab 151936 --rows 64 --kinds sft kd --compute-dtype bfloat16   # on a GPU

A made-up student of a hundred million parameters (`--shape 1b`: of about a billion; random weights, tied embedding)
takes steps over rows that are all supervised, with 64 kept ids at every position.  A step is that of `student-train
run`, from a dataset on disk: waiting for its batch, moving it, forward and backward pass, clipping, AdamW, and all that
the log says of it.

- `sft`: labels alone, `kd_weight: 0`.  `kd`: cross-entropy and forward KL with a tail at T = 1, `kd_weight: 0.9`.
- `kd_t2`: the same at T = 2.  `kd_jsd`: another divergence.
- `sft_plain`: labels alone, by transformers' own loss on the logits of all tokens.

`seconds` is the median of --repeats rounds, each of which takes every kind of step once, in turn; `ratio` the median
over rounds of a step's time over that of the round's `sft`; `wait` the share of the time that a batch was waited for;
`mfu` the model FLOPs utilisation, where the device's peak is known; `peak_bytes` the device's, of all kinds together
(ask for one kind to have its own).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.amounts import size
from shared.batching import PaddedBatch
from shared.device import host_peak_bytes, peak_bytes, pick_device
from shared.rows import LogitRow, Positions
from student_train.config import TrainSettings
from student_train.train import Trainer
from tests.bench.loss import seconds_of
from tests.shared.made_datasets import write_dataset
from tests.tiny import make_model, make_tokenizer

ROW_TOKENS, KEPT = 257, 64
SHAPES = {
    "100m": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 15, "num_attention_heads": 10},
    "1b": {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 26, "num_attention_heads": 24},
}
WARM_STEPS = 2
STEPS: dict[str, dict[str, Any]] = {
    "sft": {"kd_weight": 0.0},
    "kd": {"kd_weight": 0.9},
    "kd_t2": {"kd_weight": 0.9, "temperature": 2},
    "kd_jsd": {"kd_weight": 0.9, "divergence": "jsd"},
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


def write_rows(folder: Path, arguments: argparse.Namespace, tokenizer: Any) -> Path:
    """A dataset with as many rows as the steps take, in shards of 64."""
    num_rows = arguments.rows * (arguments.repeats + WARM_STEPS)
    rows = made_up_rows(num_rows, arguments.vocab)
    shards = [rows[begin : begin + 64] for begin in range(0, num_rows, 64)]
    return write_dataset(
        folder, shards, tokenizer=tokenizer.backend_tokenizer, vocab_size=arguments.vocab,
        keep={"method": "topk", "k": KEPT, "max_kl": 1e-4},
    )  # fmt: skip


class Steps:
    """The trainers of all kinds of step, side by side; every kind is a function without arguments."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        heads = {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True}
        shape = SHAPES[arguments.shape] | heads
        self._model = make_model(folder / "student", vocab_size=arguments.vocab, spread=0.1, **shape)
        self._dataset = write_rows(folder / "dataset", arguments, make_tokenizer(self._model))
        self.device = pick_device(arguments.device)
        self.trainers = {name: self._trainer(name, STEPS[name]) for name in STEPS if name in arguments.kinds}
        num_steps = arguments.repeats + WARM_STEPS
        self._batches = {name: trainer.data.batches(0, num_steps) for name, trainer in self.trainers.items()}
        self._rows = made_up_rows(arguments.rows, arguments.vocab)
        self.waited_s = dict.fromkeys(self.trainers, 0.0)

    def _trainer(self, name: str, loss: dict[str, Any]) -> Trainer:
        tree = {
            "student": {
                "model": str(self._model),
                "dtype": self._arguments.dtype,
                "compute_dtype": self._arguments.compute_dtype,
                "gradient_checkpointing": self._arguments.gradient_checkpointing,
                "compile": self._arguments.compile,
            },
            "data": {"dataset": str(self._dataset)},
            "loss": loss,
            "output": str(self._folder / name),
            "steps": self._arguments.repeats + WARM_STEPS,
            "rows_per_step": self._arguments.rows,
            "batch_tokens": self._arguments.batch_tokens,
            "device": self._arguments.device,
            "checkpoint": {"every_minutes": None},
        }
        return Trainer(TrainSettings.model_validate(tree))

    def kinds(self) -> dict[str, Callable[[], None]]:
        ours = {name: lambda name=name: self.step(name) for name in self.trainers}
        return ours | ({"sft_plain": self.plain_step} if "sft_plain" in self._arguments.kinds else {})

    def step(self, name: str) -> None:
        begin_s = time.monotonic()
        batch = next(self._batches[name])
        self.waited_s[name] += time.monotonic() - begin_s
        self.trainers[name]._step(batch)

    def plain_step(self) -> None:
        """By another loss, on the first trainer's student and with its optimizer."""
        trained = self.trainers["sft"]._trained
        model: Any = trained.model
        batch = PaddedBatch.of(self._rows, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._arguments.compute_dtype == "bfloat16"):
            loss = model.train()(input_ids=batch.input_ids_BL, labels=batch.input_ids_BL).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        for batches in self._batches.values():
            batches.close()


def measure(steps: Steps, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    kinds = steps.kinds()
    for _ in range(WARM_STEPS):
        for step in kinds.values():
            step()
    steps.waited_s = dict.fromkeys(steps.trainers, 0.0)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.repeats):
        for name, step in kinds.items():
            seconds[name].append(seconds_of(step, steps.device))
    steps.close()
    positions = arguments.rows * (ROW_TOKENS - 1)
    first = next(iter(steps.trainers.values()))
    flops = first.student.flops.of_step([ROW_TOKENS] * arguments.rows, positions)
    peak = first._peak_flops
    return [
        {
            "variant": name,
            "parameters": sum(parameter.numel() for parameter in first.student.model.parameters()),
            "vocab": arguments.vocab,
            "dtype": arguments.dtype,
            "positions": positions,
            "k": KEPT,
            "seconds": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, next(iter(seconds.values())), strict=True)),
            "tokens_per_s": arguments.rows * ROW_TOKENS / statistics.median(found),
            "mfu": None if peak is None else flops / peak / statistics.median(found),
            "peak_bytes": peak_bytes(steps.device) or host_peak_bytes(),
            "wait": steps.waited_s.get(name, 0.0) / sum(found),
            "positions_per_s": positions / statistics.median(found),
        }
        for name, found in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--rows", type=int, default=8, help=f"of {ROW_TOKENS} tokens, in each step")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="of one forward pass")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", choices=list(SHAPES), default="100m")
    parser.add_argument("--kinds", nargs="+", choices=[*STEPS, "sft_plain"], default=[*STEPS, "sft_plain"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write a list with one object for each variant")
    arguments = parser.parse_args()
    if "sft_plain" in arguments.kinds and "sft" not in arguments.kinds:
        parser.error("sft_plain takes its student from sft: name both")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Steps(arguments, Path(scratch) / "student"), arguments)
    first = rows[0]
    print(
        f"{first['parameters'] / 1e6:.0f} million parameters, vocabulary {first['vocab']:,}, {first['dtype']}, "
        f"{first['positions']:,} positions a step"
    )
    for row in rows:
        mfu = "" if row["mfu"] is None else f", mfu {row['mfu']:.1%}"
        speed = f"{row['tokens_per_s']:,.0f} tokens/s{mfu}, peak {size(row['peak_bytes'])}"
        ratio = f"{row['ratio']:6.3f} x {first['variant']}"
        print(f"{row['variant']:<10} {row['seconds']:8.3f} s {ratio}, waited {row['wait']:.2%}, {speed}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
