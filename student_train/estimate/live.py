"""What lives of the tensors that operations make, counted from birth to end as an allocator would."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self._peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            # What would come of it is known for bfloat16 alone.
            args = pytree.tree_map_only(
                Tensor, lambda each: each.bfloat16() if each.is_floating_point() else each, args
            )
            result = func(*args, **(kwargs or {})).float()
        else:
            result = func(*args, **(kwargs or {}))
        self.see(pytree.tree_leaves(result))
        return result

    def see(self, leaves: Iterable[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())

    def mark(self) -> int:
        """The most since the last mark."""
        peak, self._peak = self._peak, self.now
        return peak

    def _count(self, storage: Any) -> None:
        key, size_bytes = id(storage), storage.nbytes()
        if key in self._known:
            return

        def ended(_: Any) -> None:
            del self._known[key]
            self.now -= size_bytes

        self._known[key] = weakref.ref(storage, ended)
        self.now += size_bytes
        self._peak = max(self._peak, self.now)
