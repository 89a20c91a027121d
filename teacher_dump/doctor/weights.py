"""Whether a teacher's weights fit into memory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shared.amounts import size
from shared.doctor.devices import host_memory, memory_of
from shared.doctor.finding import Finding, attempt
from shared.doctor.model import Opened
from shared.doctor.weights import loaded_bytes
from teacher_dump.config import TeacherSettings
from teacher_dump.doctor.devices import devices_of
from teacher_dump.doctor.run import dtypes_of


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
    num_bytes = loaded_bytes(folder, None if is_quantized else itemsize)
    scratch = logits_bytes(teacher.chunk_positions, opened.vocab_size, itemsize, torch.device(devices[0].type))
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
