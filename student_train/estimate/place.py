"""Where a run will be: the device that is here, or another machine's of which the memory alone is known."""

import re
from dataclasses import dataclass

import torch

from shared.device import compiles_every_shape, has_variable_length_kernels, peak_flops, pick_device, pick_dtype
from shared.doctor.devices import memory_of
from shared.errors import ConfigError
from shared.pretrained import has_softcap, load_config
from student_train.attention import Attention
from student_train.config import TrainSettings
from student_train.packing import Shape

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def bytes_of(text: str) -> int:
    """What 80GiB, 64 GB or 40g are; a B without an i counts in powers of 1000.

    Raises:
        ValueError: it is no such size, or none at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    base = 1000 if found and found[4] and not found[3] else 1024
    size_bytes = int(float(found[1]) * base ** UNITS[found[2].lower()]) if found else 0
    if not size_bytes:
        raise ValueError(f"{text!r} is no size; write it like 80GiB or 64GB")
    return size_bytes


@dataclass(frozen=True, kw_only=True)
class Place:
    """The device of one process, of several that are alike."""

    device: torch.device | None
    """None is an accelerator that is not here."""
    memory_bytes: int | None
    """All that it has; None where it does not say."""
    num_ranks: int

    @staticmethod
    def of(settings: TrainSettings, memory_bytes: int | None, num_ranks: int) -> "Place":
        """As the settings and the machine say, unless the memory is another machine's."""
        try:
            device = pick_device(settings.device)
        except ConfigError:  # of another machine, which it need not be on
            device = None
        if device is not None and device.type == "cpu" and memory_bytes is not None and settings.device == "auto":
            device = None
        if memory_bytes is None and device is not None:
            found = memory_of(device)
            shared_by = num_ranks if device.type == "cpu" else 1
            memory_bytes = None if found is None else found[1] // shared_by
        return Place(device=device, memory_bytes=memory_bytes, num_ranks=num_ranks)

    @property
    def is_accelerator(self) -> bool:
        return self.device is None or self.device.type != "cpu"

    @property
    def name(self) -> str:
        """For people."""
        return "an accelerator" if self.device is None else str(self.device)

    def is_static(self, settings: TrainSettings) -> bool:
        """Whether every pass has the same shape."""
        if settings.static_shapes is not None:
            return settings.static_shapes
        return settings.student.compile or (self.device is not None and compiles_every_shape(self.device))

    def attention(self, settings: TrainSettings) -> Attention:
        """The one that a run will settle on, unless a trial of the model shows it a fault."""
        asked, is_static = settings.student.attention, self.is_static(settings)
        if not settings.packing:
            return Attention(None)
        if asked != "auto":
            return Attention(asked)
        if has_softcap(load_config(settings.student)):
            return Attention("eager" if is_static else None)
        if self.device is not None and has_variable_length_kernels(self.device, pick_dtype(settings.student.dtype)):
            return Attention("flash_attention_2")
        return Attention("sdpa" if is_static else "varlen")

    def shape(self, settings: TrainSettings, attention: Attention, longest_row: int) -> Shape:
        """Of a forward pass."""
        return attention.shape(settings.batch_tokens, longest_row, is_static=self.is_static(settings))

    def peak_flops(self, settings: TrainSettings) -> float | None:
        """Of its matrix products, per second; None where it is not known."""
        if settings.log.peak_tflops is not None:
            return settings.log.peak_tflops * 1e12
        if self.device is None:
            return None
        return peak_flops(self.device, pick_dtype(settings.student.product_dtype))
