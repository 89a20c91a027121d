"""Nothing of positions × vocabulary ever lives: every tensor that an operation makes is looked at."""

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shared.models import OutputHead
from student_train.objective import Objective
from tests.student_train.references import fused, lesson

N, D, V, CHUNK = 512, 8, 997, 32


class Sizes(TorchDispatchMode):
    """The numbers in the storage of the largest tensor that any operation gave back."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        sizes = [tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in tensors]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"divergence": "jsd", "z_loss": 1e-3}], ids=str)
def test_no_tensor_is_larger_than_a_chunk_of_logits(settings: dict[str, Any], dtype: torch.dtype):
    said = lesson(torch.randn(N, V), [10] * N, temperature=settings.get("temperature", 1.0))
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    head = OutputHead(weight_VD=weight, bias_V=None, softcap=5.0, scale=0.5)
    with Sizes() as sizes:
        fused(hidden, head, said, Objective(kd_weight=0.9, **settings), chunk_positions=CHUNK).total.backward()
    assert sizes.largest == CHUNK * V < N * V / 10
