"""Units of consecutive prompts: what is asked of the student, and what becomes of its replies."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from shared.errors import NonFiniteError
from student_train.eval.generation import Reply, text_of
from student_train.lineage import source_of
from student_train.rollout.config import KeepSettings
from student_train.rollout.filters import why_dropped
from student_train.rollout.ledger import DATA, DROPPED, Counts
from student_train.rollout.plan import Plan
from student_train.rollout.prompts import Prompt
from student_train.rollout.task import Ask
from student_train.rollout.verifier import Verifier

NLL_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class UnitWork:
    """All that it takes to turn prompts and replies into files."""

    plan: Plan
    prompts: Sequence[Prompt]
    """Of all units."""
    tokenizer: Any
    verifier: Verifier | None
    keep: KeepSettings
    seed: int

    def size(self, number: int) -> int:
        """Replies of a unit."""
        return len(self._prompts(number)) * self.plan.samples

    def asks(self, number: int) -> list[Ask]:
        """All samples of a prompt, one after the other."""
        return [
            Ask(prompt=prompt.ids_L.tolist(), key=f"{self.seed}/{prompt.prompt_id}/{sample}")
            for prompt, sample in self._samples(number)
        ]

    def texts(self, number: int, replies: Sequence[Reply]) -> tuple[dict[str, bytes], Counts]:
        """The lines of a unit's files, by their folders.

        Raises:
            NonFiniteError: the student's logits were no numbers.
            LogitferryError: the verifier fails.
        """
        lines: dict[str, list[str]] = {DATA: [], DROPPED: []}
        num_ids = max(self.tokenizer.get_vocab().values()) + 1
        dropped, marks = Counter[str](), Counter[bool | None]()
        for (prompt, sample), reply in zip(self._samples(number), replies, strict=True):
            right = self._mark(prompt, reply)
            marks[right] += 1
            record = self._record(prompt, sample, reply, right)
            reason = why_dropped(reply, right, self.keep, num_ids=num_ids)
            if reason is not None:
                dropped[reason] += 1
                record["reason"] = reason
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
            lines[DATA if reason is None else DROPPED].append(f"{line}\n")
        counts = Counts(
            replies=len(replies),
            tokens=sum(reply.num_tokens for reply in replies),
            cut=sum(reply.is_cut for reply in replies),
            right=marks[True],
            wrong=marks[False],
            dropped=dict(sorted(dropped.items())),
            nll=fmean(reply.nll or 0.0 for reply in replies),
        )
        return {folder: "".join(each).encode() for folder, each in lines.items()}, counts

    def _prompts(self, number: int) -> Sequence[Prompt]:
        begin = number * self.plan.unit_prompts
        return self.prompts[begin : begin + self.plan.unit_prompts]

    def _samples(self, number: int) -> Iterator[tuple[Prompt, int]]:
        return ((prompt, sample) for prompt in self._prompts(number) for sample in range(self.plan.samples))

    def _mark(self, prompt: Prompt, reply: Reply) -> bool | None:
        if self.verifier is None or not prompt.can_verify:
            return None
        return self.verifier.is_right(
            prompt.prompt_id,
            reply=reply.text,
            reference=prompt.reference,
            prompt=text_of(self.tokenizer, prompt.ids_L.tolist()),
        )

    def _record(self, prompt: Prompt, sample: int, reply: Reply, right: bool | None) -> dict[str, Any]:
        """Read as ready tokens; see `shared.layout`."""
        writer, num_prompt = self.plan.writer, len(prompt.ids_L)
        if reply.nll is None or not math.isfinite(reply.nll):
            raise NonFiniteError(
                f"the reply to prompt {prompt.prompt_id!r} has a mean −log p of {reply.nll}",
                next_step="try student.dtype: float32; if it stays, look at the student's weights",
            )
        return {
            "sample_id": f"{prompt.prompt_id}~{writer}.{sample}",
            "source": source_of(writer, prompt.source),
            "input_ids": [*prompt.ids_L.tolist(), *reply.ids],
            "label_mask": [False] * num_prompt + [True] * reply.num_tokens,
            "prompt_id": prompt.prompt_id,
            "sample": sample,
            "student": writer,
            "right": right,
            "nll": round(reply.nll, NLL_DIGITS),
            "is_cut": reply.is_cut,
            "reply": reply.text,
        }
