"""Whether a teacher's weights fit into memory, told from the headers of their files."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shared.errors import ConfigError
from teacher_dump.config import TeacherSettings
from teacher_dump.doctor.devices import devices_of, host_memory, memory_of
from teacher_dump.doctor.finding import Finding, attempt, size
from teacher_dump.doctor.run import Opened, dtypes_of

INDEX_NAME = "model.safetensors.index.json"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""What is cast to the teacher's dtype when it is loaded, with its bytes; anything else stays as it is."""


def weights(teacher: TeacherSettings, opened: Opened) -> Iterator[Finding]:
    """Their bytes, once they are loaded, against the memory of all devices that share them."""
    import torch

    from shared.device import pick_dtype
    from teacher_dump.scoring import logits_bytes

    devices, unusable = attempt("weights", partial(devices_of, teacher))
    if opened.config is None or devices is None or unusable:  # which other checks say
        return
    folder = Path(teacher.model)
    if not folder.is_dir():
        yield Finding("weights", "ok", "how many bytes they are is not known before they are downloaded")
        return
    if teacher.engine == "vllm" and not any(folder.glob("*.safetensors")):
        yield Finding(
            "weights", "warning", f"{folder} holds no *.safetensors; whether vLLM reads the rest is not known"
        )
        return
    itemsize = pick_dtype(dtypes_of(teacher, opened)[0]).itemsize
    is_quantized = getattr(opened.config, "quantization_config", None) is not None
    num_bytes = sum(_loaded_bytes(file, None if is_quantized else itemsize) for file in weight_files(folder))
    vocab_size = opened.config.get_text_config().vocab_size
    scratch = logits_bytes(teacher.chunk_positions, vocab_size, itemsize, torch.device(devices[0].type))
    what = f"{size(num_bytes)} once loaded and {size(scratch)} for logits"
    found = [memory_of(device) for device in devices]
    rooms = [room for room in found if room is not None]
    if len(rooms) < len(found):
        yield Finding("weights", "ok", f"{what}; {devices[0]} does not say how much memory it has")
        return
    yield _fit(teacher, what, num_bytes + scratch * len(devices), rooms, on_host=devices[0].type == "cpu")
    host = host_memory()
    by_way_of_host = devices[0].type != "cpu" and teacher.engine == "transformers" and teacher.device_map is None
    if by_way_of_host and host is not None and num_bytes > host[1]:
        yield Finding("weights", "warning", f"{what}; they are loaded by way of the host, which has {size(host[1])}")


def weight_files(folder: Path) -> list[Path]:
    """Those that are loaded; some repositories hold the same weights a second time under other names.

    Raises:
        ConfigError: one is missing, or there is none.
    """
    whole, index = folder / "model.safetensors", folder / INDEX_NAME
    if whole.is_file():
        names = [whole.name]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} files of weights, first {missing[0]}" if missing else "*.safetensors"
        raise ConfigError(f"{folder} lacks {what}", next_step="download or copy the folder again, as a whole")
    return [folder / name for name in names]


def _loaded_bytes(file: Path, itemsize: int | None) -> int:
    """From the header alone; floats count `itemsize` each, where they are cast."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118  it is no mapping
            floats = [(math.prod(each.get_shape()), FLOATS.get(each.get_dtype())) for each in slices]
            changes = [count * (itemsize - own) for count, own in floats if itemsize is not None and own is not None]
            return file.stat().st_size + sum(changes)
    except safetensors.SafetensorError as error:
        raise ConfigError(
            f"{file} is cut off, or not what it should be: {error}", next_step="download or copy it again"
        ) from error


def _fit(teacher: TeacherSettings, what: str, needed: int, rooms: list[tuple[int, int]], *, on_host: bool) -> Finding:
    """Of each device free and all bytes are given.  One teacher of vLLM's is cut into equal parts."""
    free, total = sum(room[0] for room in rooms), sum(room[1] for room in rooms)
    usable = total
    if teacher.engine == "vllm" and not on_host:
        parts = teacher.vllm.tensor_parallel * teacher.vllm.pipeline_parallel
        free, total = (min(amounts) * parts for amounts in zip(*rooms, strict=True))
        usable = int(total * teacher.vllm.memory_fraction)
    where = "the host" if on_host else f"{len(rooms)} device{'s' * (len(rooms) > 1)}"
    found = f"{what}; {where}: {size(free)} free of {size(total)}"
    if needed > usable and teacher.vllm.quantization is not None:
        return Finding(
            "weights", "warning", f"{found}; whether {teacher.vllm.quantization} makes them fit is not known"
        )
    if needed > usable and teacher.device_map is not None and needed <= usable + (host_memory() or (0, 0))[1]:
        return Finding("weights", "warning", f"{found}; a part would stay in the host's memory, which is very slow")
    if needed > usable:
        spread = "engine: vllm with tensor_parallel, or device_map: auto, spreads them over more devices"
        return Finding("weights", "mend", found, f"they do not fit: {spread}; teacher.dtype: bfloat16 halves float32")
    if needed > free:
        return Finding("weights", "warning", f"{found}: too little is free now", "end what else uses this memory")
    return Finding("weights", "ok", found)
