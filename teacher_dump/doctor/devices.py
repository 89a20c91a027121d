"""Which devices a run uses, and the memory of them and of the host."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_dump.config import TeacherSettings

if TYPE_CHECKING:
    import torch

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def devices_of(teacher: TeacherSettings | None) -> "list[torch.device]":
    """Those that a run would use, as many as there are; all of them where there are no settings.

    Raises:
        ConfigError: the settings name one that is not there.
    """
    import torch

    from shared.device import pick_device

    first = pick_device(teacher.device if teacher else "auto")
    if first.type == "cpu":
        return [first]
    every = [torch.device(first.type, index) for index in range(torch.accelerator.device_count())]
    if teacher is None or teacher.device_map is not None:
        return every
    if teacher.engine == "vllm":
        return every[: teacher.vllm.tensor_parallel * teacher.vllm.pipeline_parallel]
    return [torch.device(first.type, first.index or 0)]


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
