"""Parameters that FSDP2 or tensor parallelism spread over ranks, made whole where a computation needs all of them."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def whole(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter as one plain tensor, gathered in `dtype` where it is sharded; as it is where it is not.

    On the way back the ranks' gradients are averaged and scattered, as DDP and FSDP2 do it with all others, so a sum
    over ranks needs the loss times their number.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    sharded: Any = parameter.to(dtype)
    gathered = sharded.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered
