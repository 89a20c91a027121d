"""The devices of this machine, their names and memory, and the memory of the host."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from shared.amounts import size

if TYPE_CHECKING:
    import torch

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def every_device() -> "list[torch.device]":
    """All of the accelerator that torch finds, else the CPU."""
    import torch

    from shared.device import pick_device

    first = pick_device("auto")
    if first.type == "cpu":
        return [first]
    return [torch.device(first.type, index) for index in range(torch.accelerator.device_count())]


def describe(device: "torch.device") -> str:
    """One line: what it is called and how much memory it has."""
    if device.type == "cpu":
        return f"no accelerator; the CPU has {os.cpu_count()} cores"
    found = memory_of(device)
    room = "does not say how much memory it has" if found is None else f"{size(found[0])} free of {size(found[1])}"
    return f"{device}: {name_of(device)}, {room}"


def name_of(device: "torch.device") -> str:
    """What its maker calls it, where torch can say."""
    import torch

    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return "of unknown name" if ask is None else str(ask(device))


def memory_of(device: "torch.device") -> tuple[int, int] | None:
    """Free and all bytes; None where that cannot be known."""
    import torch

    if device.type == "cpu":
        return host_memory()
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if ask is None else ask(device)


def host_memory() -> tuple[int, int] | None:
    """Available and all bytes of the host, or of what its container may use."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        available, total = (int(lines[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError):
        pages = {"SC_AVPHYS_PAGES", "SC_PHYS_PAGES", "SC_PAGE_SIZE"}
        if not pages <= os.sysconf_names.keys():
            return None
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        available, total = os.sysconf("SC_AVPHYS_PAGES") * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.exists() else "max"
        total = min(total, int(text)) if text.isdigit() else total
    return min(available, total), total
