"""One student on several devices: DDP, where each holds all of it, or FSDP2, where weights, gradients and optimizer are
spread over them and a layer is whole on a device only while it is computed.

Both hook into the forward pass of a module.  So everything that uses a weight, the loss with the output matrix
included, is the forward pass of one module: a weight that was used past it would keep a gradient of its own rank alone.

Every rank divides its loss by the mean over ranks of Σ c, and the ranks' gradients are averaged.  That is the gradient
of the whole step's loss, however unlike the ranks' shares are:

    1/R · Σ_r [ Σ_r c_i·L_i / (1/R · Σ c) ]  =  Σ c_i·L_i / Σ c
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shared.models import output_head
from student_train.attention import Attention, evaluating
from student_train.fused_linear import fused_linear_loss
from student_train.objective import Objective
from student_train.passes import ForwardPass
from student_train.ranks import Ranks

How = Literal["ddp", "fsdp"]
PROBE_TOKENS = 8


class PassLoss(nn.Module):
    """Body, output matrix and loss of one forward pass.

    Products run in `compute_dtype` where that is not the weights': under autocast, or as FSDP2 casts what it gathers.
    """

    def __init__(
        self, model: Any, attention: Attention, *, chunk_positions: int | None, compute_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model, self.attention = model, attention
        self.compute_dtype = compute_dtype
        self._chunk_positions = chunk_positions

    def forward(
        self, of: ForwardPass, objective: Objective, denominator: float, detailed: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss and the measures [M, N] of a pass that is on the model's device."""
        device_type = of.input_ids_BL.device.type
        with torch.autocast(device_type, self.compute_dtype) if self.compute_dtype else nullcontext():
            loss = fused_linear_loss(
                of.hidden_at_positions(self.model.base_model, self.attention),
                output_head(self.model),
                of.targets,
                objective,
                denominator=denominator,
                chunk_positions=self._chunk_positions,
                detailed=detailed,
            )
        return loss.total, loss.measures.values_MN


def spread(module: PassLoss, how: How, ranks: Ranks) -> nn.Module:
    """The module as all ranks train it together; as it is where there is one rank."""
    if ranks.count == 1:
        return module
    if how == "ddp":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # older torch knows no newer name
            return DistributedDataParallel(
                module,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=not _uses_all(module.model),
            )
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    dtype, module.compute_dtype = module.compute_dtype, None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    for layer in layers_of(module.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def _uses_all(model: Any) -> bool:
    """Whether a few tokens reach every weight, as an expert that none of them is sent to is not."""
    ids_BL = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
    with torch.enable_grad(), evaluating(model):
        hidden = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    reached = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    ahead, seen = [hidden.grad_fn], set[Any]()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        ahead += [before for before, _ in node.next_functions]
    return all(id(parameter) in reached for parameter in model.parameters() if parameter.requires_grad)


def layers_of(model: Any) -> list[nn.Module]:
    """What a model is a stack of: what its authors name as not to be cut, or else its longest list of modules."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return named or list(max(lists, key=len, default=[]))


def accumulating(module: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Around one of several passes: under DDP gradients travel in the last of them.

    Under FSDP2 they travel in each, so that none is ever whole on a device.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not is_last else nullcontext()


def put_away(module: nn.Module) -> None:
    """Let go of what FSDP2 still holds of a forward pass that had no backward one."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()
