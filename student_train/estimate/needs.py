"""The memory that settings need, and what of them to change where a device has less."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from shared.device import pick_dtype
from student_train.attention import Attention
from student_train.config import TrainSettings
from student_train.estimate.fake_student import FakeStudent
from student_train.estimate.memory import Memory, pass_memory, sharded, whole
from student_train.estimate.place import Place
from student_train.estimate.rows import RunRows, typical_passes
from student_train.objective import Objective

logger = logging.getLogger("logitferry")

STEP_TOKENS = 256
"""What batch_tokens is a multiple of, where it is solved for."""
MOST_RANKS = 1024
MOST_GUESSES = 4


@dataclass(frozen=True, kw_only=True)
class Change:
    """One that lets a run fit, or come nearer to it."""

    settings: list[str]
    """In the form of --set."""
    ranks: int
    total_bytes: int
    fits: bool


class Needs:
    """The memory that settings need at a place, and those of settings that differ a little."""

    def __init__(
        self,
        settings: TrainSettings,
        place: Place,
        rows: RunRows,
        objective: Objective,
        *,
        student: FakeStudent | None = None,
    ) -> None:
        """`student` is that of the settings, where there is one already."""
        self._settings, self._place, self._rows, self._objective = settings, place, rows, objective
        attention = place.attention(settings)
        self.passes = typical_passes(rows, place.shape(settings, attention, rows.longest_row), place.num_ranks)
        self.student = student or self._fake_student(attention)

    @cached_property
    def _gathered(self) -> FakeStudent:
        """FSDP2 has the body compute in what it gathers weights in."""
        student = self._settings.student
        if not self._is_sharded or not student.is_mixed:
            return self.student
        return self._fake_student(self.student.attention, dtype=pick_dtype(student.product_dtype))

    def _fake_student(self, attention: Attention, dtype: torch.dtype | None = None) -> FakeStudent:
        on_accelerator = self._place.is_accelerator
        return FakeStudent(self._settings.student, attention, on_accelerator=on_accelerator, dtype=dtype)

    @cached_property
    def _passing(self) -> Memory:
        return pass_memory(
            self._gathered,
            self.passes.fullest,
            self._objective,
            self._settings,
            # DDP's buckets are the gradients, and stay; what FSDP2 keeps is its share of them.
            accumulates=self._place.num_ranks > 1 or self.passes.per_step > 1,
        )

    @property
    def _is_sharded(self) -> bool:
        return self._place.num_ranks > 1 and self._settings.parallel == "fsdp"

    @property
    def memory(self) -> Memory:
        """On each device."""
        return self.memory_on(self._place.num_ranks)

    def memory_on(self, num_ranks: int) -> Memory:
        """With another number of processes, where they are several; the passes are as full."""
        own, on_accelerator = self.student.sizes, self._place.is_accelerator
        if not self._is_sharded:
            return whole(own, self._passing, on_accelerator=on_accelerator)
        return sharded(
            own,
            self._gathered.sizes,
            self._passing,
            num_ranks=num_ranks,
            sums_in_fp32=self._gathered is not self.student,
            on_accelerator=on_accelerator,
        )

    def with_settings(self, *changes: str, num_ranks: int | None = None) -> "Needs":
        """Of settings that differ so."""
        tree = self._settings.model_dump()
        for change in changes:
            path, value = change.split("=")
            *parents, leaf = path.split(".")
            branch = tree
            for parent in parents:
                branch = branch[parent]
            branch[leaf] = {"true": True}.get(value, int(value) if value.isdecimal() else value)
        settings = TrainSettings.model_validate(tree)
        place = replace(self._place, num_ranks=num_ranks or self._place.num_ranks)
        same = settings.student == self._settings.student and place.attention(settings) == self.student.attention
        return Needs(settings, place, self._rows, self._objective, student=self.student if same else None)

    def changes(self, room: int) -> list[Change]:
        """What to change first, each by itself; and where none of them is enough, all that cost no accuracy."""
        logger.info("it does not fit: looking for what would")
        found = []
        if batch_tokens := self._largest_batch(room):
            found.append(self._change(room, f"batch_tokens={batch_tokens}"))
        student, thrifty = self._settings.student, []
        if not student.gradient_checkpointing:
            thrifty.append("student.gradient_checkpointing=true")
        if student.dtype == "float32" and student.compute_dtype != "bfloat16":
            thrifty.append("student.compute_dtype=bfloat16")
        found += [self._change(room, change) for change in thrifty]
        if thrifty and not any(change.fits for change in found):
            least = f"batch_tokens={max(STEP_TOKENS, self._rows.longest_row)}"
            found.append(self._change(room, *thrifty, least))
        if student.dtype == "float32":
            found.append(self._change(room, "student.dtype=bfloat16"))
        return found + self._spread(room, [] if student.gradient_checkpointing else thrifty[:1])

    def _change(self, room: int, *changes: str) -> Change:
        total_bytes = self.with_settings(*changes).memory.total
        ranks = self._place.num_ranks
        return Change(settings=list(changes), ranks=ranks, total_bytes=total_bytes, fits=total_bytes <= room)

    def _largest_batch(self, room: int) -> int | None:
        """The most tokens of a pass that fit, by straight lines between those that do and those that do not."""

        def need(batch_tokens: int) -> int:
            return self.with_settings(f"batch_tokens={batch_tokens}").memory.total

        least = max(STEP_TOKENS, self._rows.longest_row)
        return largest_within(room, need, least, self._settings.batch_tokens, self.memory.total)

    def _spread(self, room: int, thrifty: list[str]) -> list[Change]:
        """The fewest processes that FSDP2 has to spread the student over."""
        for changes in ([], thrifty) if thrifty else ([],):
            start = max(2, self._place.num_ranks)
            spread = self.with_settings("parallel=fsdp", *changes, num_ranks=start)
            num_ranks = start
            while num_ranks <= MOST_RANKS:
                if (total_bytes := spread.memory_on(num_ranks).total) <= room:
                    settings = ["parallel=fsdp", *changes]
                    return [Change(settings=settings, ranks=num_ranks, total_bytes=total_bytes, fits=True)]
                num_ranks *= 2
        return []


def largest_within(room: int, need: Callable[[int], int], low: int, high: int, at_high: int) -> int | None:
    """The most tokens from `low` on that need no more than there is, where `high` tokens need more; None for none.

    By straight lines between what fits and what does not, as what a pass needs lies on two or three of them.
    """
    if low >= high or (at_low := need(low)) > room:
        return None
    for _ in range(MOST_GUESSES):
        slope = (at_high - at_low) / (high - low)
        guess = min(low + int((room - at_low) / slope), high - 1) // STEP_TOKENS * STEP_TOKENS
        if guess <= low:
            break
        if (found := need(guess)) <= room:
            low, at_low = guess, found
        else:
            high, at_high = guess, found
    return low
