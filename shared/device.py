"""The one place that names a device.  The rest of the code reads the same on CPU, CUDA and Ascend NPU."""

import os
import re
import resource

import torch

from shared.errors import ConfigError

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Of torchrun and of srun: which of this machine's processes this one is."""


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator that torch finds, else the CPU; anything else is taken by its word.

    Of several accelerators it is the one of this process's rank on the machine, where torchrun or srun gives one.

    Raises:
        ConfigError: the named device does not exist here.
    """
    if name == "auto":
        # torch.accelerator came with torch 2.6 and knows CUDA, NPU (torch-npu), XPU and MPS alike.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            return torch.device("cpu")
        rank = next((os.environ[each] for each in LOCAL_RANKS if os.environ.get(each, "").isdecimal()), None)
        # Where the scheduler shows each process its own device only, there is one, whatever the rank.
        return found if rank is None else torch.device(found.type, int(rank) % torch.accelerator.device_count())
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}", next_step="set device: auto") from None
    return device


def make_current(device: torch.device) -> None:
    """The one that libraries take where they are told none: of several processes each has its own."""
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)


def pick_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def compiles_every_shape(device: torch.device) -> bool:
    """Whether new shapes cost so much there that filling tensors up is cheaper: so on Ascend."""
    return device.type == "npu"


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor in memory that `device` fetches from by itself; as it is for the CPU, or where there is no such."""
    if device.type == "cpu":
        return tensor
    try:
        return tensor.pin_memory()
    except (RuntimeError, NotImplementedError):
        return tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator and some back ends raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def free_cached_memory(device: torch.device) -> None:
    """Give back what torch's allocator holds for later; a no-op on the CPU."""
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch's allocator held on a device in this process; None where it does not count."""
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return count(device) if count is not None and device.type != "cpu" else None


def host_peak_bytes() -> int:
    """The most memory that this process had, by the operating system's account (Linux: KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def block_bytes(device: torch.device) -> int:
    """How much fp32 a run of elementwise operations should go over at once.

    On a CPU what its cache holds, so that only the first operation waits for memory; elsewhere enough to keep the
    device busy.
    """
    return (32 if device.type == "cpu" else 512) << 20


def has_variable_length_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether transformers' `flash_attention_2` runs there: by flash-attn on CUDA, by CANN on Ascend; never in fp32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if device.type == "npu":
        return True
    from transformers.utils.import_utils import is_flash_attn_2_available  # not needed to name a device

    return device.type == "cuda" and is_flash_attn_2_available()


PEAK_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    # Dense 16-bit matrix products that are summed in fp32, and fp32 without TF32, by the first line that a name fits.
    # NVIDIA's data sheets, nvidia.com/en-us/data-center; where they give figures with sparsity, half of them.
    (r"GB200", 2500.0, 80.0),
    (r"GB300", 2500.0, None),
    (r"B[23]00", 2250.0, 75.0),
    (r"H100 NVL|H200 NVL", 835.5, 60.0),
    (r"H[18]00 PCIe", 756.0, 51.0),
    (r"H100|H200|H800|GH200", 989.4, 67.0),
    (r"H20(-3e)?", 148.0, 44.0),
    (r"A[18]00", 312.0, 19.5),
    (r"A30", 165.0, 10.3),
    (r"A40", 149.7, 37.4),
    (r"A10", 125.0, 31.2),
    (r"L40S", 362.05, 91.6),
    (r"L40", 181.05, 90.5),
    (r"L20", 119.5, 59.8),
    (r"L4", 121.0, 30.3),
    (r"RTX A6000", 154.8, 38.7),
    (r"RTX 6000 Ada", 364.2, 91.1),
    # NVIDIA's architecture white papers on GA102, Ada and Blackwell.
    (r"RTX 5090(?! (D|Laptop))", 209.5, 104.8),
    (r"RTX 4090(?! (D|Laptop))", 165.2, 82.6),
    (r"RTX 3090(?! Ti)", 71.0, 35.6),
    # amd.com/en/products/accelerators/instinct
    (r"MI300X|MI325X", 1307.4, 163.4),
)
"""Of Ascend processors no data sheet tells the kinds of 910B and 910_93 apart; a guess would be worse than nothing."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most operations per second that a device does in matrix products of a dtype; None where it is not known."""
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return None if ask is None or device.type == "cpu" else peak_flops_of(str(ask(device)), dtype)


def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    """The same of a device that torch calls so.  A slice of one (MIG) is not known."""
    if "MIG" in name.split():
        return None
    for pattern, of_16_bits, of_fp32 in PEAK_TFLOPS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", name):
            found = {torch.bfloat16: of_16_bits, torch.float16: of_16_bits, torch.float32: of_fp32}.get(dtype)
            return None if found is None else found * 1e12
    return None
