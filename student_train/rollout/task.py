"""What an engine is asked to write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from student_train.eval.generation import Reply, Stops
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
