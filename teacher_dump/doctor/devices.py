"""Which devices a dump uses."""

from typing import TYPE_CHECKING

from shared.doctor.devices import every_device
from teacher_dump.config import TeacherSettings

if TYPE_CHECKING:
    import torch


def devices_of(teacher: TeacherSettings | None) -> "list[torch.device]":
    """Those that a run would use, as many as there are; all of them where there are no settings.

    Raises:
        ConfigError: the settings name one that is not there.
    """
    import torch

    from shared.device import pick_device

    if teacher is None:
        return every_device()
    first = pick_device(teacher.device)
    if first.type == "cpu":
        return [first]
    every = [torch.device(first.type, index) for index in range(torch.accelerator.device_count())]
    if teacher.device_map is not None:
        return every
    if teacher.engine == "vllm":
        return every[: teacher.vllm.tensor_parallel * teacher.vllm.pipeline_parallel]
    return [torch.device(first.type, first.index or 0)]
