"""A device named `npu` that is neither CPU nor CUDA, for tests on a machine that has none.

Every tensor on it holds a CPU tensor; an operation runs on those and its result is put on the device again.  As on a
real one, tensors of two devices do not mix.  float64 is refused, and so is whatever asks for CUDA.  `register` can be
called once in a process, so tests that use it start one of their own.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
calls: Counter[str] = Counter()
"""How often each operation ran on the device."""


class FakeTensor(torch.Tensor):
    """A tensor on the device; `raw` is the CPU tensor that holds its numbers."""

    raw: torch.Tensor

    @staticmethod
    def wrap(raw: torch.Tensor) -> "FakeTensor":
        if raw.dtype == torch.float64:
            raise RuntimeError("this device has no float64")
        tensor: Any = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
        tensor.__class__ = FakeTensor
        tensor.raw = raw
        return tensor


class Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _lazy_init() -> None:
        pass

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    torch.library.impl("aten::_copy_from", "PrivateUse1")(copy_from)
    register.keep = library  # type: ignore[attr-defined]  # it unregisters when it goes


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the CPU tensors behind the device's."""
    calls[str(operation)] += 1
    wrapped = {id(leaf.raw): leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)}

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return leaf.raw
        if isinstance(leaf, torch.Tensor) and leaf.ndim and wrapped:
            raise RuntimeError(f"{operation}: expected all tensors on {NAME}, got one on {leaf.device}")
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf

    def rewrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return wrapped.get(id(leaf)) if id(leaf) in wrapped else FakeTensor.wrap(leaf)

    return pytree.tree_map(rewrap, operation(*pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs)))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    (target.raw if isinstance(target, FakeTensor) else target).copy_(
        source.raw if isinstance(source, FakeTensor) else source
    )
    return target
