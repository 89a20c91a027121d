"""What lies in the folder of a run, checked once; a run that is going on, or was killed, is read as far as it is.

Shapes: S steps that were logged, in order.  A number that was not logged, or is no number, is NaN.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.config import load_settings
from shared.errors import ConfigError, DamagedDataError
from student_train.config import TrainSettings
from student_train.evaluation import Evaluation
from student_train.run_folder import CHECKPOINTS_FOLDER, CONFIG_NAME, HELD_OUT_NAME, LOG_NAME, RUN_NAME

CHECKPOINT_STATES = f"{CHECKPOINTS_FOLDER}/step-*/state.json"

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class _Logged(BaseModel):
    """Closed to values of another kind, open to keys of a later release."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class BadRow(_Logged):
    """A row of a step that went wrong."""

    sample_id: str
    ce: float | None = None
    kd: float | None = None


class Anomaly(_Logged):
    """What was wrong with a step."""

    reason: str
    skipped: bool = False
    rows: list[BadRow] = []


class _Numbers(_Logged):
    loss: float | None = None
    ce: float | None = None
    kd: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    positions: float | None = None
    accuracy: float | None = None
    student_entropy: float | None = None
    teacher_entropy: float | None = None
    kept_mass: float | None = None
    student_kept_mass: float | None = None
    agreement: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    wait: float | None = None
    waste: float | None = None
    peak_bytes: float | None = None
    rollouts: float | None = None
    stale_steps: float | None = None
    elapsed_s: float | None = None


class _Line(_Numbers):
    """A line of the log: of a step, or of a look at the held-out rows."""

    step: int = Field(ge=0, lt=1 << 53)
    anomaly: Anomaly | None = None
    held_out: dict[str, float | None] | None = None


NUMBERS = tuple(_Numbers.model_fields)
LARGEST = 1e30
"""What is larger is no number: nothing that is logged comes near, and charts could not tell it from infinity."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run."""

    name: str
    folder: Path
    settings: TrainSettings
    step_S: Int64
    numbers: dict[str, Float64]
    """By their names in the log [S]; `took_s`, how long each step took, besides."""
    anomalies: dict[int, Anomaly]
    """By step."""
    looks: dict[int, dict[str, float]]
    """Means over the held-out rows, by step."""
    elapsed_s: float
    """Up to the last line."""
    planned_steps: int | None
    record: dict[str, Any] | None
    """run.json, of a run that is finished."""
    held_out: Evaluation | None
    is_cut: bool
    """The last line of the log is a part of one."""

    @property
    def steps(self) -> int:
        """The last one."""
        return int(self.step_S[-1]) if len(self.step_S) else 0

    @property
    def newest_look(self) -> dict[str, float]:
        """At the held-out rows; empty where there was none."""
        return self.looks[max(self.looks)] if self.looks else {}

    @property
    def is_finished(self) -> bool:
        return self.record is not None

    @cached_property
    def bad_S(self) -> NDArray[np.bool_]:
        """Steps that went wrong; older logs say so by a loss that is no number."""
        return np.isin(self.step_S, list(self.anomalies)) | np.isnan(self.numbers["loss"])

    def of(self, name: str) -> Float64:
        """One number of every step [S]."""
        return self.numbers[name]

    def held(self, name: str) -> tuple[list[int], list[float]]:
        """One mean of the held-out rows: the steps of the looks that have it, and its values."""
        found = {step: means[name] for step, means in self.looks.items() if not math.isnan(means.get(name, math.nan))}
        return list(found), list(found.values())

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self.of(name)).any())


def read_stage(folder: Path, name: str) -> Stage:
    """A run as far as it is; `name` is what people call it.

    Raises:
        ConfigError: this is no run's folder, or its config cannot be read.
        DamagedDataError: a file of it is not what the trainer writes.
    """
    _require_run(folder)
    settings = load_settings(TrainSettings, folder / CONFIG_NAME)
    log = _read_log(folder / LOG_NAME)
    record = _read_record(folder / RUN_NAME)
    held_out = folder / HELD_OUT_NAME
    return Stage(
        name=name,
        folder=folder,
        settings=settings,
        step_S=np.array(log.steps, np.int64),
        numbers=log.numbers(),
        anomalies=log.anomalies,
        looks=log.looks,
        elapsed_s=log.elapsed_s,
        planned_steps=_planned_steps(folder, settings, record),
        record=record,
        held_out=Evaluation.read(held_out) if held_out.exists() else None,
        is_cut=log.is_cut,
    )


def _require_run(folder: Path) -> None:
    if (folder / CONFIG_NAME).is_file():
        return
    inside = sorted(path.parent for path in folder.glob(f"*/{LOG_NAME}")) if folder.is_dir() else []
    if inside:
        next_step = f"name the runs in it, first stage first, as: student-train report {' '.join(map(str, inside[:4]))}"
    elif folder.is_file() and (folder.parent / CONFIG_NAME).is_file():
        next_step = f"student-train report {folder.parent}"
    else:
        next_step = "name the `output` of a config; `student-train run CONFIG` makes it"
    found = "is a file" if folder.is_file() else "has no config.yaml" if folder.is_dir() else "is not there"
    raise ConfigError(
        f"{folder} is no run's folder, which holds {CONFIG_NAME} and {LOG_NAME}: it {found}", next_step=next_step
    )


@dataclass
class _Log:
    """The lines of a log, as they come."""

    steps: list[int] = field(default_factory=list)
    values: list[list[float | None]] = field(default_factory=list)
    anomalies: dict[int, Anomaly] = field(default_factory=dict)
    looks: dict[int, dict[str, float]] = field(default_factory=dict)
    elapsed_s: float = 0.0
    is_cut: bool = False

    def add(self, line: _Line) -> None:
        before_s, self.elapsed_s = self.elapsed_s, line.elapsed_s if line.elapsed_s is not None else self.elapsed_s
        if line.held_out is not None:
            self.looks[line.step] = {name: _number(value) for name, value in line.held_out.items()}
            return
        self.steps.append(line.step)
        self.values.append([*(getattr(line, name) for name in NUMBERS), max(self.elapsed_s - before_s, 0.0)])
        if line.anomaly is not None:
            self.anomalies[line.step] = line.anomaly

    def numbers(self) -> dict[str, Float64]:
        names = (*NUMBERS, "took_s")
        values_SN = np.array(self.values, np.float64).reshape(len(self.steps), len(names))
        values_SN[~(np.abs(values_SN) < LARGEST)] = np.nan
        return dict(zip(names, np.ascontiguousarray(values_SN.T), strict=True))


def _number(value: float | None) -> float:
    return value if value is not None and abs(value) < LARGEST else math.nan


def _read_log(path: Path) -> _Log:
    log = _Log()
    try:
        with path.open("rb") as file:
            for number, text, is_last in _lines(file):
                try:
                    line = _Line.model_validate_json(text)
                except ValidationError as error:
                    if is_last and (b"\0" in text or not text.endswith(b"\n")):
                        log.is_cut = True
                        break
                    raise _damaged(path, number, error) from None
                if log.steps and line.step <= log.steps[-1] - (line.held_out is not None):
                    raise DamagedDataError(
                        f"{path}:{number}: step {line.step} stands behind step {log.steps[-1]}, and each step once",
                        next_step="is this log put together of several?  name the run's own folder",
                    )
                log.add(line)
    except FileNotFoundError:
        pass  # a run that has only just begun
    except DamagedDataError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    return log


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Each with its number, and whether nothing comes after it but blank lines or what a power cut leaves."""
    held: tuple[int, bytes] | None = None
    for number, text in enumerate(file, 1):
        if not text.strip(b"\0\r\n\t "):
            continue
        if held is not None:
            yield (*held, False)
        held = number, text
    if held is not None:
        yield (*held, True)


def _damaged(path: Path, number: int, error: ValidationError) -> DamagedDataError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return DamagedDataError(
        f"{path}:{number}: is no line of a run's log: {where + ': ' if where else ''}{first['msg']}",
        next_step=f"look at the line: sed -n {number}p {path}; without it, the page can be made",
    )


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedDataError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise DamagedDataError(f"{path} holds no record of a run, but a {type(record).__name__}")
    return record


def _planned_steps(folder: Path, settings: TrainSettings, record: dict[str, Any] | None) -> int | None:
    """As the settings or the record say; of a run by epochs that goes on, as its newest checkpoint says."""
    if settings.steps is not None:
        return settings.steps
    try:
        if record is not None:
            return int(record["steps"])
        newest = max(folder.glob(CHECKPOINT_STATES))
        return int(json.loads(newest.read_bytes())["identity"]["stage"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
