"""Which engine runs the student.  A back end is one class and one line here."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from shared.device import make_current, pick_device, pick_dtype
from shared.models import load_model
from student_train.eval.generation import Reply, Stops, Writer
from student_train.eval.sampling import Sampling
from student_train.rollout.config import RolloutSettings

Told = Callable[[Sequence[Reply]], None]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A prompt, and the name that the draws of its reply depend on."""

    prompt: list[int]
    key: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is the same for all prompts."""

    settings: RolloutSettings
    dtype: str
    tokenizer: Any
    stops: Stops
    context_tokens: int | None
    longest_prompt: int
    on_written: Told
    """Is told of replies as they come."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.settings.temperature, top_p=self.settings.top_p, top_k=self.settings.top_k)

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens that a reply to it may have."""
        limit = self.settings.max_new_tokens
        return limit if self.context_tokens is None else min(limit, self.context_tokens - len(prompt))


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
