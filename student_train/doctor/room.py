"""What of room `doctor` looks at: of a device for weights, gradients and moments, and of the output for checkpoints.

Rough, from the headers of the weights' files alone: `student-train estimate` goes through a step.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shared.amounts import size
from shared.doctor.devices import every_device, memory_of
from shared.doctor.finding import Finding, attempt
from shared.doctor.model import Opened
from shared.doctor.output import output_folder as look_at_folder
from shared.doctor.weights import loaded_bytes
from student_train.config import StudentSettings, TrainSettings
from student_train.run_folder import CHECKPOINTS_FOLDER, CONFIG_NAME

MOMENTS = 2
SLOW = "every checkpoint waits for it: a local disk is faster"


def weight_bytes(student: StudentSettings) -> int | None:
    """Once they are loaded; None where the weights are not here.

    Raises:
        ConfigError: a file of them is missing or cut off.
    """
    from shared.device import pick_dtype

    folder = Path(student.model)
    return loaded_bytes(folder, pick_dtype(student.dtype).itemsize) if folder.is_dir() else None


def weights(settings: TrainSettings, opened: Opened) -> Iterator[Finding]:
    """What a step needs at the very least, against the memory of the device or of all that share it."""
    from shared.device import pick_device

    if opened.config is None:  # of which another check tells
        return
    num_bytes = weight_bytes(settings.student)
    if num_bytes is None:
        yield Finding("weights", "ok", "how many bytes they are is not known before they are downloaded")
        return
    what = f"{size(num_bytes)} of weights"
    if settings.student.lora is None:
        num_bytes *= 2 + MOMENTS
        what += f", {size(num_bytes)} with gradients and AdamW's moments"
    device, _ = attempt("weights", partial(pick_device, settings.device))
    if device is None:  # as well
        return
    shares = every_device() if settings.parallel == "fsdp" and device.type != "cpu" else [device]
    rooms = [memory_of(each) for each in shares]
    if not all(rooms):
        yield Finding("weights", "ok", f"{what}; {device} does not say how much memory it has")
        return
    total = sum(room[1] for room in rooms if room is not None)
    where = "the host" if device.type == "cpu" else f"{len(shares)} device{'s' * (len(shares) > 1)}"
    found = f"{what}; {where}: {size(total)} in all"
    if num_bytes > total:
        mend = "they do not fit: parallel: fsdp spreads them over more devices, student.lora trains few of them"
        yield Finding("weights", "mend", found, mend)
        return
    yield Finding("weights", "ok", f"{found}; what a pass needs besides, student-train estimate tells")


def output_folder(settings: TrainSettings) -> Iterator[Finding]:
    """Whose it is, what is in it, and how much room there is for checkpoints."""
    from student_train.train import finished_run

    if done := finished_run(settings):
        yield Finding("output", "ok", f"this run is finished: {done['model']}, {done['steps']:,} steps")
        return
    room = partial(_room, settings)
    yield from look_at_folder(settings.output, [CONFIG_NAME, CHECKPOINTS_FOLDER], room, slow=SLOW)


def _room(settings: TrainSettings, found: str, free: int) -> Finding:
    num_bytes, _ = attempt("disk", partial(weight_bytes, settings.student))
    if num_bytes is None:  # the check of the weights says why
        return Finding("disk", "ok", found)
    state = 0 if settings.student.lora else (1 + MOMENTS) * num_bytes
    # The newest checkpoint is whole before the oldest goes.
    most = num_bytes + (settings.checkpoint.keep + 1) * state
    found += f"; checkpoints and the model take about {size(most)}"
    if most > free:
        return Finding(
            "disk", "warning", found, "make room, keep fewer checkpoints (checkpoint.keep), or move `output`"
        )
    return Finding("disk", "ok", found)
