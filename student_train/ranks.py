"""Processes that train one student together, each on its share of every step, and what they tell each other.

Numbers for people and decisions travel between hosts' memories; gradients and weights between devices, see
`student_train.parallel`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import distributed

from shared.device import make_current


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
        """Each value summed over the ranks, in double precision."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            distributed.all_reduce(total)
        return total.tolist()

    def gathered(self, said: bytes) -> list[bytes]:
        """What every rank says, in their order."""
        if self.count == 1:
            return [said]
        lengths = self.sums([len(said) * (rank == self.rank) for rank in range(self.count)])
        own = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        own[: len(said)] = torch.frombuffer(bytearray(said or b"\0"), dtype=torch.uint8)[: len(said)]
        every = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(every, own)
        return [bytes(each[: int(length)].numpy()) for each, length in zip(every, lengths, strict=True)]

    def barrier(self) -> None:
        """Go on when all ranks are here."""
        self.sums([0.0])  # between hosts: a device's own barrier would first have to know which device that is


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun, or what sets the same variables, has started; one alone where nothing did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=device)
        return
    # Counts travel between hosts' memories, gradients between devices.
    own = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(own if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}")
    make_current(device)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
