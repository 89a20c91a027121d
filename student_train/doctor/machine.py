"""What of a machine `doctor` looks at for a student's sake."""

from collections.abc import Iterator

from shared.doctor.ascend import PACKAGE, package_version
from shared.doctor.devices import describe, every_device
from shared.doctor.finding import Finding
from student_train.config import TrainSettings


def devices(settings: TrainSettings | None) -> Iterator[Finding]:
    """All that there are, then the one that the settings ask for."""
    from shared.device import pick_device

    every = every_device()
    blind = every[0].type == "cpu" and package_version() is not None
    for device in every:
        mend = f"{PACKAGE} sees none: is the driver there, and does ASCEND_RT_VISIBLE_DEVICES name one that is?"
        yield Finding("devices", "warning" if blind else "ok", describe(device), mend if blind else None)
    if settings is not None:
        pick_device(settings.device)


def extras_of(settings: TrainSettings | None) -> list[str]:
    """The extras of logitferry that settings ask for."""
    if settings is None:
        return []
    asked = {
        "lora": settings.student.lora is not None,
        "tensorboard": settings.log.tensorboard,
        "wandb": settings.log.wandb is not None,
    }
    return [name for name, is_asked in asked.items() if is_asked]
