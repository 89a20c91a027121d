"""A device named `npu` that is neither CPU nor CUDA, for tests on a machine that has none.

Behind every tensor on it stands one on the CPU; an operation runs on those, and its result is put on the device again.
As on a real one, tensors of two devices do not mix, and there is no float64.  `register` can be called once in a
process, so tests that use it start one of their own.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
calls: Counter[str] = Counter()
"""How often each operation ran on the device."""
_behind: dict[int, torch.Tensor] = {}
"""By storage: autograd makes tensors of its own, that share the storage and nothing else."""


class Stream:
    """The one that there is: all work is done when it was asked for."""

    wait_stream = synchronize = staticmethod(lambda *_: None)


STREAM = Stream()


class Module:
    """What torch asks of a device's module."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    manual_seed_all = staticmethod(lambda seed: None)
    current_stream = staticmethod(lambda: STREAM)
    stream = staticmethod(nullcontext)
    _lazy_init = synchronize = staticmethod(lambda *_: None)


def register() -> None:
    """Make the device known to this process, for good."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    for name, work in (("_copy_from", copy_from), ("as_strided", as_strided), ("view", view)):
        torch.library.impl(f"aten::{name}", "PrivateUse1")(work)
    for name, operation in composed():
        torch.library.impl(name, "PrivateUse1")(partial(run, operation))
    Module.library = library  # type: ignore[attr-defined]  # what is registered goes when it does


def composed() -> Iterator[tuple[str, Any]]:
    """What torch would compose of operations that resize their result, behind the back of its tensor on the device."""
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if (
            name.startswith("aten::")
            and name != "aten::_to_copy"
            and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
        ):
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if not any(each.alias_info for each in (*operation._schema.arguments, *operation._schema.returns)):
                yield name, operation


def put(raw: torch.Tensor) -> torch.Tensor:
    """A tensor on the device with this one behind it."""
    if raw.dtype == torch.float64:
        raise RuntimeError(f"{NAME} has no float64")
    tensor = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
    _behind[tensor.untyped_storage()._cdata] = raw
    return tensor


def behind(tensor: torch.Tensor) -> torch.Tensor:
    return _behind[tensor.untyped_storage()._cdata] if tensor.device.type == NAME else tensor


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the CPU tensors behind the device's."""
    calls[str(operation)] += 1
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = {id(behind(leaf)): leaf for leaf in tensors if leaf.device.type == NAME}
    strangers = [leaf.device for leaf in tensors if leaf.device.type != NAME and leaf.ndim]
    if on_device and strangers:
        raise RuntimeError(f"{operation}: expected all tensors on {NAME}, found one on {strangers[0]}")

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return behind(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def rewrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return on_device[id(leaf)] if id(leaf) in on_device else put(leaf)

    # A number in the place of a tensor has been unpacked on the way here.
    places = zip(args, operation._schema.arguments, strict=False)
    args = tuple(torch.tensor(x) if isinstance(x, int | float) and str(a.type) == "Tensor" else x for x, a in places)
    return pytree.tree_map(rewrap, operation(*pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs)))


def as_strided(tensor: torch.Tensor, size: list[int], stride: list[int], offset: int | None = None) -> torch.Tensor:
    """To torch every tensor of the device is contiguous; where the one behind it is not, the result is a copy."""
    raw = behind(tensor)
    if raw.is_contiguous():
        return put(raw.as_strided(size, stride, (offset or 0) + raw.storage_offset()))
    index = torch.arange(raw.numel()).as_strided(size, stride, offset or 0)
    return put(raw.reshape(-1)[index])


def view(tensor: torch.Tensor, size: list[int]) -> torch.Tensor:
    return put(behind(tensor).reshape(size))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Between devices, either way."""
    behind(target).copy_(behind(source))
    return target
