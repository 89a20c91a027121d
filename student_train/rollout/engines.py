"""Which engine runs the student.  A back end is one class and one line here."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from shared.device import make_current, pick_device, pick_dtype
from shared.models import load_model
from student_train.eval.generation import Reply, Writer
from student_train.rollout.task import Ask, Task


class Engine(Protocol):
    """What runs the student."""

    def write(self, units: Iterable[Sequence[Ask]]) -> Generator[list[Reply]]:
        """The replies of each unit, in order; a unit may be taken before the one before it is given back."""
        ...

    def close(self) -> None: ...


class TransformersEngine:
    """Writes a unit in batches."""

    def __init__(self, task: Task) -> None:
        settings = task.settings
        device = pick_device(settings.device)
        make_current(device)
        self._task = task
        self._writer = Writer(
            load_model(settings.student, dtype=pick_dtype(task.dtype), device=device),
            task.tokenizer,
            stops=task.stops,
            max_new_tokens=settings.max_new_tokens,
            batch_rows=settings.batch_rows,
            context_tokens=task.context_tokens,
            section="",
        )

    def write(self, units: Iterable[Sequence[Ask]]) -> Generator[list[Reply]]:
        for asks in units:
            yield self._writer.write(
                [each.prompt for each in asks],
                sampling=self._task.sampling,
                keys=[each.key for each in asks],
                on_written=self._task.on_written,
            )

    def close(self) -> None:
        pass


@contextmanager
def open_engine(task: Task) -> Iterator[Engine]:
    """The loaded student.

    Raises:
        ConfigError, MismatchError, LogitferryError: it cannot be loaded.
    """
    if task.settings.engine == "vllm":
        from student_train.rollout.vllm_engine import VllmEngine

        engine: Engine = VllmEngine(task)
    else:
        engine = TransformersEngine(task)
    try:
        yield engine
    finally:
        engine.close()
