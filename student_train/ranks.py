"""What ranks share: parameters that are spread over them, and the count that all of them divide by.

Every rank computes the loss of its own positions, and DDP and FSDP2 average the ranks' gradients.  That average is the
gradient of the whole step's loss where every rank divides by `mean_over_ranks` of Σ c, however unlike their shares are:

    1/R · Σ_r [ Σ_r c_i·L_i / (1/R · Σ c) ]  =  Σ c_i·L_i / Σ c
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean of what every rank passes; the value itself where there is one process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = torch.tensor(value, dtype=torch.float32, device=device)
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


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
