"""Where a run's numbers go besides its own log: TensorBoard, Weights & Biases.

They get what the log gets.  One that fails, for want of a network or of room, is left away with a warning: it is no
reason to lose a run.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shared.errors import ConfigError
from student_train.config import LogSettings, TrainSettings
from student_train.run_folder import TENSORBOARD_FOLDER

logger = logging.getLogger("logitferry")


class Sink(Protocol):
    """Takes numbers by name."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(settings: TrainSettings, *, after: int | None) -> list[Sink]:
    """What the settings ask for; a run that goes on does so after step `after`.

    Raises:
        ConfigError: a package is not there.
    """
    log, output = settings.log, Path(settings.output)
    sinks: list[Sink] = []
    if log.tensorboard:
        sinks.append(_Patient("TensorBoard", lambda: _TensorBoard(output / TENSORBOARD_FOLDER, after)))
    if log.wandb is not None:
        sinks.append(_Patient("Weights & Biases", lambda: _Wandb(log, output, settings.model_dump(mode="json"))))
    return sinks


def numbers_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log, by names in groups: train/ce, held_out/ce."""
    found = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": float(each) for key, each in value.items() if _is_number(each)}
        elif name != "step" and _is_number(value):
            found[f"train/{name}"] = float(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Patient:
    """A sink that says once what keeps it from working, and then keeps still."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name, self._sink = name, None
        try:
            self._sink = make()
        except ConfigError:
            raise
        except Exception as error:
            self._warn(error)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._sink is not None:
            try:
                self._sink.write(step, numbers)
            except Exception as error:
                self._warn(error)

    def close(self) -> None:
        if self._sink is not None:
            try:
                self._sink.close()
            except Exception as error:
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._sink = None
        logger.warning("%s gets nothing from now on: %s: %s", self._name, type(error).__name__, error)


class _TensorBoard:
    def __init__(self, folder: Path, after: int | None) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"log.tensorboard needs tensorboard, which cannot be imported: {error}",
                next_step="pip install 'logitferry[tensorboard]'",
            ) from None
        # What was written of steps that are done again is not shown any more.
        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, log: LogSettings, output: Path, config: dict[str, Any]) -> None:
        assert log.wandb is not None
        try:
            import wandb  # pyright: ignore[reportMissingImports]  it is an extra
        except ImportError as error:
            raise ConfigError(
                f"log.wandb needs wandb, which cannot be imported: {error}",
                next_step="pip install 'logitferry[wandb]'",
            ) from None
        # A name that the folder decides, so that a run which goes on is the same run there.
        digest = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=log.wandb.project,
            entity=log.wandb.entity,
            name=log.wandb.name or output.name,
            id=digest,
            resume="allow",
            dir=str(output),
            config=config,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step} | dict(numbers))

    def close(self) -> None:
        self._run.finish()
