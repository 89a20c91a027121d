"""The student on vLLM: every reply is a request of its own, with a seed of its own.

Requests of the next units are handed over before the last of a unit is done, so that its longest reply does not leave
the device idle.  Log-probabilities are vLLM's raw ones: at T = 1, before anything is cut.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from shared.errors import LogitferryError
from shared.vllm_start import TESTED_VERSIONS, is_tested, quiet_environment, require_vllm, start, told
from student_train.eval.generation import Reply, text_of
from student_train.eval.sampling import seed_of
from student_train.rollout.task import Ask, Task

CPU_BATCH_TOKENS = 2048

logger = logging.getLogger("logitferry")


@dataclass
class _UnitUnderWay:
    request_ids: list[str]
    replies: dict[str, Reply] = field(default_factory=dict)

    @property
    def num_left(self) -> int:
        return len(self.request_ids) - len(self.replies)


class VllmEngine:
    """See `engines.Engine`."""

    def __init__(self, task: Task) -> None:
        version = require_vllm("engine")
        if not is_tested(version):
            logger.warning("vLLM %s is not among the versions that were tested (%s.x)", version, TESTED_VERSIONS[-1])
        quiet_environment()
        self._task, self._num_requests = task, 0
        self._engine: Any = _start(task)

    def write(self, units: Iterable[Sequence[Ask]]) -> Generator[list[Reply]]:
        """See `engines.Engine`.

        Raises:
            LogitferryError: vLLM stopped.
        """
        under_way: deque[_UnitUnderWay] = deque()
        for asks in units:
            under_way.append(_UnitUnderWay(request_ids=[self._submit(each) for each in asks]))
            while sum(unit.num_left for unit in under_way) >= self._task.settings.vllm.max_rows:
                self._step(under_way)
            yield from self._finished(under_way)
        while under_way:
            self._step(under_way)
            yield from self._finished(under_way)

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.engine_core.shutdown()

    def _submit(self, ask: Ask) -> str:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        settings = self._task.settings
        self._num_requests += 1
        request_id = str(self._num_requests)
        parameters = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or 0,
            seed=None if settings.temperature == 0 else seed_of(ask.key),
            max_tokens=self._task.room(ask.prompt),
            stop_token_ids=sorted(self._task.stops.ids),
            ignore_eos=True,  # which is among them, where there is one
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        with self._told():
            self._engine.add_request(request_id, {"prompt_token_ids": ask.prompt}, parameters)
        return request_id

    def _step(self, under_way: "deque[_UnitUnderWay]") -> None:
        with self._told():
            outputs = [output for output in self._engine.step() if output.finished]
        if not outputs and not self._engine.has_unfinished_requests():
            raise LogitferryError("vLLM lost some of its requests", next_step="run the same command again, it goes on")
        if not outputs:
            return
        unit_of = {request_id: unit for unit in under_way for request_id in unit.request_ids}
        for output in outputs:
            unit_of[output.request_id].replies[output.request_id] = self._reply(output.outputs[0])
        self._task.on_written([unit_of[output.request_id].replies[output.request_id] for output in outputs])

    def _reply(self, output: Any) -> Reply:
        ids, is_cut = tuple(output.token_ids), output.finish_reason == "length"
        return Reply(
            ids=ids,
            text=text_of(self._task.tokenizer, ids if is_cut else ids[:-1]),
            is_cut=is_cut,
            nll=-output.cumulative_logprob / len(ids),
        )

    @staticmethod
    def _finished(under_way: "deque[_UnitUnderWay]") -> Generator[list[Reply]]:
        while under_way and not under_way[0].num_left:
            unit = under_way.popleft()
            yield [unit.replies[request_id] for request_id in unit.request_ids]

    @staticmethod
    def _told() -> AbstractContextManager[None]:
        return told(
            "less vllm.memory_fraction or vllm.max_rows leaves more memory free.  Run the same command again, "
            "it goes on"
        )


def _start(task: Task) -> Any:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    student, longest = task.settings.student, task.longest_prompt + task.settings.max_new_tokens
    max_model_len = longest if task.context_tokens is None else min(longest, task.context_tokens)
    more: dict[str, Any] = {}
    if current_platform.is_cpu() and not task.sampling.is_greedy:
        # A prompt that is read in parts takes back what its seed has drawn for a part, which no CPU's generator can.
        more = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_model_len, CPU_BATCH_TOKENS)}
    return start(
        task.settings.vllm,
        setting="engine",
        model=student.model,
        revision=student.revision,
        trust_remote_code=student.trust_remote_code,
        dtype=task.dtype,
        max_model_len=max_model_len,
        enable_prefix_caching=True,  # so that a prompt is read once for all its samples
        **more,
    )
