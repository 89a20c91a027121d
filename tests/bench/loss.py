"""What the student's loss costs, in time and memory, beside rivals in the same run.

    python -m tests.bench.loss [--shape 4096,1024,65536,float32] … [--device auto] [--json FILE]

A shape is positions, hidden size, vocabulary, dtype; --kept ids are kept at each position.  Everything is one forward
and one backward pass from hidden states and output matrix to a loss and both gradients.

Variants:
- `ours`: cross-entropy and forward KL with a tail, T = 1.  `ours_t2` at T = 2 (a second softmax), `ours_jsd` another
  divergence, `ours_sft` cross-entropy alone, `ours_frozen` with an output matrix that is not trained.
- `matmuls`: the three matrix products and nothing else: what no implementation can go below.
- `cross_entropy`: logits of all positions, upcast to fp32 as transformers does; labels alone.
- `linear_cross_entropy`: torch's own chunked operation with its default options; labels alone.
- `log_softmax_gather`: sparse KL as it is usually written: log_softmax of all logits, gathered at the kept ids.
- `dense_kl`: the kept ids scattered into [positions, V] probabilities, and torch's kl_div.
- `liger_cross_entropy`, `liger_jsd`: Liger-Kernel's fused operations, where they are installed and the device is not
  the CPU; labels alone, and a dense teacher head of the student's size.

`seconds` is the median of --repeats rounds, each of which runs every variant once, in turn; what takes over three times
as long as `cross_entropy` is run once.  On an accelerator it is measured by events.  `peak_bytes` is what a process of
its own needs above its inputs: the gradients, and all that lives between; from the allocator's peak on an accelerator,
from the resident set on a CPU.  Before anything is timed, ours is compared with the plain rivals in value and gradient.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.device import pick_device, pick_dtype
from shared.models import OutputHead
from student_train.fused_linear import fused_linear_loss
from student_train.loss import Targets
from student_train.objective import Objective

SHAPES = ["4096,1024,65536,float32", "4096,1024,151936,bfloat16"]
KD_WEIGHT = 0.9
SLOW = 3.0
CHECKED_POSITIONS = 256
VARIANTS = [
    "cross_entropy",
    "ours",
    "matmuls",
    "ours_t2",
    "ours_jsd",
    "ours_sft",
    "ours_frozen",
    "log_softmax_gather",
    "dense_kl",
    "linear_cross_entropy",
    "liger_cross_entropy",
    "liger_jsd",
]
ALWAYS = VARIANTS[:3]
MEASURE_PEAK = "--measure-peak"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured: N positions, D hidden, V vocabulary, K kept."""

    positions: int
    hidden: int
    vocab: int
    dtype: str
    kept: int

    @staticmethod
    def parse(text: str, kept: int) -> "Shape":
        positions, hidden, vocab, dtype = text.split(",")
        return Shape(positions=int(positions), hidden=int(hidden), vocab=int(vocab), dtype=dtype, kept=kept)


class Inputs:
    """A seeded batch, and every variant as a function that leaves gradients in `hidden` and `weight`."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype, n, v = pick_dtype(shape.dtype), shape.positions, shape.vocab
        self.shape, self.device = shape, device
        self.hidden = torch.randn(n, shape.hidden, device=device).to(dtype).requires_grad_()
        weight = torch.randn(v, shape.hidden, device=device, dtype=dtype)
        self.weight = weight.mul_(2 / shape.hidden**0.5).requires_grad_()
        self.label = torch.randint(v, (n,), device=device)
        stride = v // shape.kept
        ids = torch.arange(shape.kept, device=device) * stride + torch.randint(stride, (n, shape.kept), device=device)
        outcomes = torch.log_softmax(torch.randn(n, shape.kept + 1, device=device) * 3, dim=1)
        self.targets = Targets(
            label_N=self.label,
            weight_N=torch.ones(n, device=device),
            kept_ids_NK=ids,
            kept_logp_NK=outcomes[:, :-1].contiguous(),
            is_kept_NK=torch.ones_like(ids, dtype=torch.bool),
            tail_logsum_N=outcomes[:, -1].contiguous(),
            entropy_N=torch.zeros(n, device=device),
            tail_at=1.0,
        )

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        no_teacher = {
            "kept_ids_NK": self.targets.kept_ids_NK[:, :0],
            "kept_logp_NK": self.targets.kept_logp_NK[:, :0],
            "is_kept_NK": self.targets.is_kept_NK[:, :0],
        }
        labels = Targets(**{**vars(self.targets), **no_teacher})
        found = {
            "ours": lambda: self.ours(self.targets, kd_weight=KD_WEIGHT),
            "ours_t2": lambda: self.ours(replace(self.targets, tail_at=2.0), kd_weight=KD_WEIGHT, temperature=2.0),
            "ours_jsd": lambda: self.ours(self.targets, kd_weight=KD_WEIGHT, divergence="jsd"),
            "ours_sft": lambda: self.ours(labels, kd_weight=0.0),
            "ours_frozen": lambda: self.ours(self.targets, weight=self.weight.detach(), kd_weight=KD_WEIGHT),
            "matmuls": self.matmuls,
            "cross_entropy": lambda: F.cross_entropy(F.linear(self.hidden, self.weight).float(), self.label),
            "log_softmax_gather": self.log_softmax_gather,
            "dense_kl": self.dense_kl,
        }
        if hasattr(F, "linear_cross_entropy"):
            options: Any = torch.nn.LinearCrossEntropyOptions()
            found["linear_cross_entropy"] = lambda: F.linear_cross_entropy(
                self.hidden, self.weight, self.label, options=options
            )
        return found | (liger(self) if self.device.type != "cpu" else {})

    def ours(self, targets: Targets, *, weight: Tensor | None = None, **objective: Any) -> Tensor:
        head = OutputHead(weight_VD=self.weight if weight is None else weight, bias_V=None, softcap=None, scale=1.0)
        return fused_linear_loss(
            self.hidden, head, targets, Objective(**objective), denominator=float(self.shape.positions)
        ).total

    def matmuls(self) -> Tensor:
        with torch.no_grad():
            product = torch.mm(self.hidden, self.weight.T)
            self.hidden.grad, self.weight.grad = torch.mm(product, self.weight), torch.mm(product.T, self.hidden)
        return torch.zeros((), requires_grad=True)

    def log_softmax_gather(self) -> Tensor:
        """Σ over the kept ids and the tail, the student's tail by 1 − Σ q: what peers do, and no more."""
        log_q = torch.log_softmax(F.linear(self.hidden, self.weight).float(), dim=1)
        kept = log_q.gather(1, self.targets.kept_ids_NK)
        tail = torch.log1p(-kept.exp().sum(dim=1))
        log_p, log_p_tail = self.targets.kept_logp_NK, self.targets.tail_logsum_N
        kl = (log_p.exp() * (log_p - kept)).sum(dim=1) + log_p_tail.exp() * (log_p_tail - tail)
        ce = F.nll_loss(log_q, self.label)
        return (1 - KD_WEIGHT) * ce + KD_WEIGHT * kl.mean()

    def dense_kl(self) -> Tensor:
        logits = F.linear(self.hidden, self.weight).float()
        p = torch.zeros_like(logits).scatter_(1, self.targets.kept_ids_NK, self.targets.kept_logp_NK.exp())
        log_q = torch.log_softmax(logits, dim=1)
        return (1 - KD_WEIGHT) * F.nll_loss(log_q, self.label) + KD_WEIGHT * F.kl_div(log_q, p, reduction="batchmean")

    def run(self, variant: Callable[[], Tensor]) -> float:
        """Forward and backward; the loss."""
        self.hidden.grad = self.weight.grad = None
        loss = variant()
        if loss.grad_fn is not None:
            loss.backward()
        return float(loss.detach())


def liger(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
            LigerFusedLinearJSD,
        )
    except ImportError:
        return {}
    cross_entropy, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD(jsd_beta=0.5)
    teacher_hidden, teacher_weight = inputs.hidden.detach().roll(1, 0), inputs.weight.detach().roll(1, 0)
    return {
        "liger_cross_entropy": lambda: cross_entropy(inputs.weight, inputs.hidden, inputs.label),
        "liger_jsd": lambda: jsd(inputs.hidden, inputs.weight, teacher_hidden, teacher_weight, inputs.label),
    }


def check(inputs: Inputs) -> None:
    """Ours against what it is compared with, in value and gradient: a fast answer must be the right one."""
    variants = inputs.variants()
    tolerance = 2e-2 if inputs.shape.dtype == "bfloat16" else 1e-3
    for ours, rival in (("ours_sft", "cross_entropy"), ("ours", "log_softmax_gather")):
        found = []
        for name in (ours, rival):
            loss = inputs.run(variants[name])
            assert inputs.hidden.grad is not None
            assert inputs.weight.grad is not None
            found.append((loss, inputs.hidden.grad.float(), inputs.weight.grad.float()))
        for what, got, expected in zip(("loss", "d hidden", "d weight"), *found, strict=True):
            a, b = torch.as_tensor(got), torch.as_tensor(expected)
            difference = float((a - b).norm() / b.norm())
            if not difference <= tolerance:
                raise SystemExit(f"{ours} and {rival} differ in {what} by {difference:.1e} of its norm")


def time_all(inputs: Inputs, names: list[str], repeats: int) -> dict[str, list[float]]:
    found = inputs.variants()
    variants = {name: found[name] for name in names if name in found}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            if seconds[name] and min(seconds[name]) > SLOW * max(seconds["cross_entropy"]):
                continue
            seconds[name].append(seconds_of(lambda variant=variant: inputs.run(variant), inputs.device))
    return seconds


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    torch.accelerator.synchronize()
    begin_event.record()
    work()
    end_event.record()
    torch.accelerator.synchronize()
    return begin_event.elapsed_time(end_event) / 1000


def measure_peak(shape: Shape, device: torch.device, name: str) -> int:
    """Bytes above the inputs; a tiny run before has loaded the code."""
    tiny = Inputs(Shape(positions=64, hidden=64, vocab=1024, dtype=shape.dtype, kept=shape.kept), device)
    tiny.run(tiny.variants()[name])
    inputs = Inputs(shape, device)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = status_bytes("VmRSS")
        inputs.run(inputs.variants()[name])
        return status_bytes("VmHWM") - before
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    inputs.run(inputs.variants()[name])
    return torch.accelerator.max_memory_allocated() - before


def status_bytes(key: str) -> int:
    match = re.search(rf"{key}:\s+([0-9]+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def measure(shape: Shape, device: torch.device, names: list[str], repeats: int) -> list[dict[str, Any]]:
    small = Inputs(replace(shape, positions=min(shape.positions, CHECKED_POSITIONS)), device)
    check(small)
    time_all(small, names, repeats=1)  # loads the code and wakes the device
    del small
    inputs = Inputs(shape, device)
    seconds = time_all(inputs, names, repeats)
    del inputs
    rows = []
    for name, found in seconds.items():
        command = [sys.executable, "-m", "tests.bench.loss", MEASURE_PEAK, json.dumps([vars(shape), str(device), name])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {"variant": name, **vars(shape), "k": shape.kept, "device": str(device)}
        rows.append(row | {"seconds": statistics.median(found), "rounds": len(found), "peak_bytes": int(done.stdout)})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    by_name = {row["variant"]: row for row in rows}
    first, floor, rival = rows[0], by_name["matmuls"], by_name["cross_entropy"]
    print(
        f"{first['positions']:,} positions, hidden {first['hidden']:,}, vocabulary {first['vocab']:,}, "
        f"{first['dtype']}, {first['kept']} kept, {first['device']}"
    )
    print(f"{'variant':<22} {'seconds':>9} {'/ matmuls':>10} {'/ CE':>6} {'peak MiB':>9} {'/ CE':>6}")
    for row in sorted(rows, key=lambda row: row["seconds"]):
        print(
            f"{row['variant']:<22} {row['seconds']:9.4f} {row['seconds'] / floor['seconds']:10.2f} "
            f"{row['seconds'] / rival['seconds']:6.2f} {row['peak_bytes'] / 2**20:9.0f} "
            f"{row['peak_bytes'] / rival['peak_bytes']:6.3f}"
        )
    item = pick_dtype(first["dtype"]).itemsize
    gradients = item * first["hidden"] * (first["vocab"] + first["positions"])
    above = (by_name["ours"]["peak_bytes"] - gradients) / rival["peak_bytes"]
    print(f"ours above its two gradients ({gradients / 2**20:.0f} MiB): {above:.3f} of cross_entropy's peak\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", help=f"positions,hidden,vocabulary,dtype; by default {SHAPES}")
    parser.add_argument("--kept", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=f"variants beside {', '.join(ALWAYS)}, separated by commas; by default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write a list with one object for each variant and shape")
    parser.add_argument(MEASURE_PEAK, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_peak:
        tree, device, name = json.loads(arguments.measure_peak)
        print(measure_peak(Shape(**tree), torch.device(device), name))
        return
    names = VARIANTS if arguments.only is None else [*ALWAYS, *filter(None, arguments.only.split(","))]
    rows = []
    for text in arguments.shape or SHAPES:
        shape = Shape.parse(text, arguments.kept)
        found = measure(shape, pick_device(arguments.device), names, arguments.repeats)
        show(found)
        rows += found
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
