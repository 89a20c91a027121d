"""Two ranks, unlike shares, several passes: the gradient is that of one process that sees everything at once.

Real gloo processes under DDP and FSDP2, with the output matrix whole, sharded, and sharded and tied.
"""

import contextlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shared.models import OutputHead
from student_train.fused_linear import fused_linear_loss
from student_train.objective import Objective
from tests.student_train.references import Lesson, lesson

D, V = 8, 53
SHARES = [[5, 12], [1, 9]]
"""Positions of each rank's two passes."""
OBJECTIVE = Objective(kd_weight=0.7, temperature=2.0, divergence="jsd", z_loss=1e-3)


class Student(nn.Module):
    """An embedding, a layer, an output matrix; its forward pass is the loss, so that DDP sees all of it."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh())
        self.head = nn.Linear(D, V)
        if tied:
            self.head.weight = self.body[0].weight

    def forward(self, said: Lesson, denominator: float) -> Tensor:
        hidden = self.body(said.label_N)
        head = OutputHead(weight_VD=self.head.weight, bias_V=self.head.bias, softcap=None, scale=1.0)
        return fused_linear_loss(hidden, head, said.targets, OBJECTIVE, denominator=denominator).total


def lessons() -> list[list[Lesson]]:
    torch.manual_seed(1)
    return [
        [
            lesson(torch.randn(n, V) * 3, [1 + i % 20 for i in range(n)], temperature=2.0, weight_N=torch.rand(n) + 0.1)
            for n in share
        ]
        for share in SHARES
    ]


def weight_of(lessons: list[Lesson]) -> float:
    return sum(said.denominator for said in lessons)


def shard(student: Student, kind: str) -> None:
    """Gathered by FSDP2 for the forward pass that the loss is a part of; or left sharded for the loss to gather."""
    if kind == "fsdp-tied":
        fully_shard(student)
    else:
        fully_shard(student.body)
        fully_shard(student.head)  # its own forward pass is never called


def work(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    student, mine = Student(tied="tied" in kind), lessons()[rank]
    if kind.startswith("fsdp"):
        shard(student, kind)
    trained: Any = student if kind.startswith("fsdp") else DistributedDataParallel(student)
    denominator = weight_of([said for share in lessons() for said in share]) / 2
    for last, said in zip((False, True), mine, strict=True):
        with contextlib.nullcontext() if last or kind.startswith("fsdp") else trained.no_sync():
            trained(said, denominator).backward()
    gradients = {}
    for name, parameter in student.named_parameters():
        assert isinstance(parameter, DTensor) == kind.startswith("fsdp"), name
        gradient: Any = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if rank == 0:
        torch.save(gradients, Path(folder) / "gradients.pt")
    distributed.barrier()
    # DDP's destructor can wait for ever for gloo's threads, which wait for the interpreter that it holds.
    os._exit(0)


@pytest.mark.parametrize("kind", ["ddp", "ddp-tied", "fsdp", "fsdp-tied"])
def test_two_ranks_give_the_gradient_of_one_process(kind: str, tmp_path: Path):
    student = Student(tied="tied" in kind)
    everything = [said for share in lessons() for said in share]
    for said in everything:
        student(said, weight_of(everything)).backward()
    torch.multiprocessing.spawn(work, args=(kind, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
