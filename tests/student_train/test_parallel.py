"""Two ranks, unlike shares, several passes: the gradient is that of one process that sees everything at once.

Real gloo processes under DDP and FSDP2, with real models, and what a pass of one rank has that one of the other lacks.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor

from student_train.config import StudentSettings
from student_train.objective import Objective
from student_train.parallel import How
from student_train.ranks import Ranks
from student_train.student import Student
from tests.shared.made_rows import V, random_rows
from tests.tiny import make_model, make_tokenizer

OBJECTIVE = Objective(kd_weight=0.7, divergence="jsd", z_loss=1e-3)
KINDS: dict[str, dict[str, Any]] = {
    "untied": {"family": "qwen2"},
    "tied": {"family": "llama_tied"},
    "with a bias": {"family": "phi_bias"},
    "checkpointed": {"family": "qwen2", "student": {"gradient_checkpointing": True}},
    "adapted": {"family": "qwen2", "student": {"lora": {"rank": 3}}},
    "mixed": {"family": "qwen2", "student": {"compute_dtype": "bfloat16"}},
}


def gradients(folder: Path, kind: str, num_rows: int, how: How, ranks: Ranks) -> tuple[dict[str, Any], list[float]]:
    """By parameter, as one process has them; and what was measured, summed over the ranks."""
    torch.manual_seed(5)  # for adapters
    settings = StudentSettings.model_validate({"model": str(folder)} | KINDS[kind].get("student", {}))
    student = Student(settings, torch.device("cpu"), batch_tokens=48)
    student.spread(how, ranks)
    everything = random_rows(0, num_rows)
    maker = student.pass_maker(OBJECTIVE, longest_row=max(row.num_tokens for row in everything), ranks=ranks)
    passes, _ = maker.make(everything)
    denominator = sum(row.num_positions for row in everything) / ranks.count
    loss, measures = student.gradients(passes, OBJECTIVE, denominator=denominator)
    found = {}
    for name, parameter in student.model.named_parameters():
        if parameter.requires_grad:
            gradient: Any = parameter.grad
            assert isinstance(gradient, DTensor) == (how == "fsdp" and ranks.count > 1), name
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    sums = ranks.sums([float(loss) / ranks.count, *torch.stack([each.sums() for each in measures]).sum(0).tolist()])
    student.save(folder.with_name(f"{folder.name}-{ranks.count}"), ranks, lambda _: None)
    seen = [float(each.of("ce").sum()) for _, each in student.measured(passes, OBJECTIVE)]
    assert len(seen) == len(passes)
    return found, sums


def work(rank: int, kinds: list[str], how: How, num_rows: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    ranks = Ranks(rank, 2)
    for kind in kinds:
        found = gradients(Path(folder) / kind, kind, num_rows, how, ranks)
        if rank == 0:
            torch.save(found, Path(folder) / f"{kind}.pt")
    ranks.barrier()
    # DDP's destructor can wait for ever for gloo's threads, which wait for the interpreter that it holds.
    os._exit(0)


@pytest.mark.cluster
@pytest.mark.parametrize(("how", "num_rows"), [("ddp", 13), ("fsdp", 13), ("ddp", 1), ("fsdp", 1)])
def test_two_ranks_give_the_gradient_of_one_process(how: How, num_rows: int, tmp_path: Path):
    """With one row a rank has nothing to say, and still has its part in what all do together."""
    kinds = list(KINDS) if num_rows > 1 else ["untied"]
    for kind in kinds:
        make_tokenizer(make_model(tmp_path / kind, family=KINDS[kind]["family"], vocab_size=V))
    torch.multiprocessing.spawn(work, args=(kinds, how, num_rows, str(tmp_path)), nprocs=2)
    for kind in kinds:
        expected, sums = gradients(tmp_path / kind, kind, num_rows, how, Ranks())
        got, got_sums = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert got.keys() == expected.keys()
        # Autocast keeps norms and sums in fp32, where FSDP2 casts all that it gathers.
        exact = kind != "mixed"
        np.testing.assert_allclose(got_sums[:6], sums[:6], rtol=1e-5 if exact else 2e-2)
        one, two = (load_file(tmp_path / f"{kind}-{count}/model.safetensors") for count in (1, 2))
        assert one.keys() == two.keys(), "a tied weight once"
        assert all(torch.equal(one[name], two[name]) for name in one)
        if not exact:
            got, expected = ({"all": torch.cat([each.flatten() for each in of.values()])} for of in (got, expected))
        for name, gradient in expected.items():
            error = float((got[name] - gradient).norm() / gradient.norm().clamp_min(1e-6))
            assert error < (2e-6 if exact else 3e-2), f"{kind}, {name}: {error}"
