"""Processes that train one student together, each on its share of every step.

Every rank computes the loss of its own positions, and the ranks' gradients are averaged.  That average is the gradient
of the whole step's loss where every rank divides by the mean over ranks of Σ c, however unlike their shares are:

    1/R · Σ_r [ Σ_r c_i·L_i / (1/R · Σ c) ]  =  Σ c_i·L_i / Σ c

Every rank knows the rows of all, so nothing has to be asked for that mean.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Partial

AVERAGED_BYTES = 64 << 20
"""Of gradients that travel at once."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many this process is."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of this rank."""

    @property
    def is_first(self) -> bool:
        """The one that writes what there is one of."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in double precision: between their hosts, not their devices."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            distributed.all_reduce(total)
        return total.tolist()

    def average_gradients_(self, model: nn.Module) -> None:
        """The mean over ranks of every gradient, in place; a parameter without one has a gradient of 0."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.count == 1:
            return
        for some in _runs([parameter.grad for parameter in parameters if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in some])
            distributed.all_reduce(flat)
            flat /= self.count
            for gradient, averaged in zip(some, flat.split([each.numel() for each in some]), strict=True):
                gradient.copy_(averaged.view_as(gradient))

    def barrier(self) -> None:
        """Go on when all ranks are here."""
        if self.count > 1:
            distributed.barrier()


def _runs(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, up to AVERAGED_BYTES."""
    run: list[Tensor] = []
    for tensor in tensors:
        if run and (tensor.dtype != run[0].dtype or sum(each.nbytes for each in run) >= AVERAGED_BYTES):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun, or what sets the same variables, has started; one alone where nothing did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=device)
        return
    # Counts travel between hosts' memories, gradients between devices.
    own = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(own if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()


def whole(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter as one plain tensor, gathered in `dtype` where it is sharded; as it is where it is not.

    On the way back the ranks' gradients are averaged and scattered, as DDP and FSDP2 do it with all others; in `dtype`,
    and in every pass, whatever FSDP2 was told of its own reductions.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    sharded: Any = parameter.to(dtype)
    gathered = sharded.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered
