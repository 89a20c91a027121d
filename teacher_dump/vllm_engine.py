"""The teacher on vLLM: rows are prompts of one forward pass, stored values are computed in its workers.

A row of L tokens is a prompt without its last token, cut behind the last position: what comes later predicts nothing
that is stored.  vLLM samples one token behind every prompt, which is thrown away.  There is no padding: vLLM puts
tokens of many rows into one pass and cuts long rows to fill it (chunked prefill).  Prefix caching is off: of tokens
that it would skip there are no hidden states.

At start the engine scores a few tokens and compares them with vLLM's own log-probabilities of a prompt, so that a
release which orders hidden states otherwise is found before a row is scored.
"""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from shared.device import pick_dtype
from shared.errors import ConfigError, LogitferryError, MismatchError
from shared.manifest import Teacher
from shared.rows import Positions, Row
from shared.vllm_start import TESTED_VERSIONS, is_tested, quiet_environment, require_vllm, start, told
from teacher_dump.config import TeacherSettings
from teacher_dump.keep import Threshold, TopK
from teacher_dump.scoring import logits_bytes
from teacher_dump.vllm_worker import ASKED, HOOK, request_of, unpack

UNITS_UNDER_WAY = 2
PROBE_LENGTHS = (9, 4, 14)
PROBE_TOLERANCE = {"float32": 1e-3}
PROBE_TOLERANCE_16_BITS = 0.05
"""Nats, on average over the tokens: a logit of 8 to 16 has steps of 0.06 in bfloat16, and is seldom another one."""

logger = logging.getLogger("logitferry")


def require_tested() -> str:
    """The version of vLLM; a warning where it is none that was tested.

    Raises:
        ConfigError: it is not installed, or the environment asks for what cannot work.
    """
    found = require_vllm("teacher.engine")
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("0", "false", "False"):
        raise ConfigError(
            "VLLM_USE_V2_MODEL_RUNNER is set, but stored values are computed in vLLM's first model runner",
            next_step="unset VLLM_USE_V2_MODEL_RUNNER",
        )
    if not is_tested(found):
        logger.warning(
            "vLLM %s is not among the versions that were tested (%s.x); what it says is compared with its own "
            "log-probabilities before a row is scored",
            found,
            ".x, ".join(TESTED_VERSIONS),
        )
    return found


def _told() -> AbstractContextManager[None]:
    return told(
        "less teacher.vllm.memory_fraction, teacher.batch_tokens or teacher.chunk_positions leaves more memory free.  "
        "Run the same command again, it goes on"
    )


@dataclass
class _UnitUnderWay:
    rows: Sequence[Row]
    request_ids: list[str]
    unfinished: set[str]


class VllmEngine:
    """Scores rows with one replica of the teacher; `longest_row` is that of the data."""

    def __init__(
        self,
        settings: TeacherSettings,
        identity: Teacher,
        rule: TopK | Threshold,
        temperatures: Sequence[float],
        longest_row: int,
    ) -> None:
        version = require_tested()
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        quiet_environment()
        self._rule, self._settings = rule, settings
        self._num_requests = 0
        self._chunk_positions = settings.chunk_positions
        self._engine: Any = _start(settings, identity, max(longest_row, max(PROBE_LENGTHS) + 1))
        try:
            self._begin(version, identity, temperatures)
        except BaseException:
            self.close()
            raise

    def _begin(self, version: str, identity: Teacher, temperatures: Sequence[float]) -> None:
        settings, rule = self._settings, self._rule
        sizes = {"vocab_size": identity.vocab_size, "chunk_positions": settings.chunk_positions}
        reasons = self._on_workers("logitferry_begin", asdict(rule), list(temperatures), sizes)
        if any(reasons):
            raise MismatchError(
                f"vLLM {version}: {next(filter(None, reasons))}; tested with {', '.join(TESTED_VERSIONS)}.x",
                next_step=f"pip install 'vllm=={TESTED_VERSIONS[-1]}.*', or set teacher.engine: transformers",
            )
        self._compare_with_vllm(version, identity)

    def score(self, units: Iterable[Sequence[Row]]) -> Generator[list[Positions]]:
        """See `scoring.Engine`; two units are under way at once, so that the end of one leaves no gap.

        Raises:
            LogitferryError: vLLM stopped.
        """
        under_way: deque[_UnitUnderWay] = deque()
        for rows in units:
            ids = [self._submit(row) for row in rows]
            under_way.append(_UnitUnderWay(rows=rows, request_ids=ids, unfinished=set(ids)))
            while len(under_way) >= UNITS_UNDER_WAY:
                yield self._finish_first(under_way)
        while under_way:
            yield self._finish_first(under_way)

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.engine_core.shutdown()

    def _submit(self, row: Row, **more: Any) -> str:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        self._num_requests += 1
        request_id = str(self._num_requests)
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={ASKED: request_of(row, self._rule, request_id)},
            **more,
        )
        prompt = row.input_ids_L[: int(row.source_index_P[-1]) + 1].tolist()
        with _told():
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, parameters)
        return request_id

    def _step(self) -> list[Any]:
        with _told():
            return self._engine.step()

    def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of `WorkerExtension` gives on every worker."""
        with _told():
            return self._engine.collective_rpc(method, args=arguments)

    def _finish_first(self, under_way: "deque[_UnitUnderWay]") -> list[Positions]:
        first = under_way[0]
        while first.unfinished:
            finished = {output.request_id for output in self._step() if output.finished}
            for unit in under_way:
                unit.unfinished -= finished
        under_way.popleft()
        return self._take(first)

    def _take(self, unit: _UnitUnderWay) -> list[Positions]:
        taken: dict[str, list[bytes]] = {}
        for of_rank in self._on_workers("logitferry_take", unit.request_ids):
            taken.update(of_rank)
        sizes = set(self._on_workers("logitferry_chunk_positions"))
        if min(sizes) < self._chunk_positions:
            self._chunk_positions = min(sizes)
            logger.warning("out of memory: teacher.chunk_positions is %d from now on", self._chunk_positions)
        scored = [unpack(taken[request_id]) if request_id in taken else None for request_id in unit.request_ids]
        for row, positions in zip(unit.rows, scored, strict=True):
            if positions is None or positions.num_positions != row.num_positions:
                got = 0 if positions is None else positions.num_positions
                raise LogitferryError(
                    f"row {row.sample_id!r}: vLLM computed {got} of its {row.num_positions} positions",
                    next_step="please report this with vLLM's version and teacher.vllm; engine: transformers is there",
                )
        return [positions for positions in scored if positions is not None]

    def _compare_with_vllm(self, version: str, identity: Teacher) -> None:
        """Score a few short rows together, and compare with what vLLM says of them by itself.

        Raises:
            MismatchError: the two differ.
        """
        probes = [_probe(length, identity.vocab_size) for length in PROBE_LENGTHS]
        ids = [self._submit(probe, prompt_logprobs=0) for probe in probes]
        outputs: dict[str, Any] = {}
        while len(outputs) < len(probes):
            outputs |= {output.request_id: output for output in self._step() if output.finished}
        scored = self._take(_UnitUnderWay(rows=probes, request_ids=ids, unfinished=set()))
        ours, theirs = [], []
        for probe, request_id, positions in zip(probes, ids, scored, strict=True):
            # vLLM's begin with None for the first token; the last token is no part of the prompt.
            of_tokens = list(zip(outputs[request_id].prompt_logprobs[1:], probe.input_ids_L[1:-1], strict=True))
            theirs += [logprobs[int(token)].logprob for logprobs, token in of_tokens]
            ours += positions.realised_logp_P[: len(of_tokens)].tolist()
        difference = float(np.abs(np.subtract(ours, theirs)).mean())
        if not difference <= PROBE_TOLERANCE.get(identity.dtype, PROBE_TOLERANCE_16_BITS):
            raise MismatchError(
                f"vLLM {version}: log p of a few tokens is {np.round(ours, 3).tolist()} by {HOOK}, "
                f"but {np.round(theirs, 3).tolist()} by vLLM's prompt_logprobs",
                next_step=f"pip install 'vllm=={TESTED_VERSIONS[-1]}.*', or set teacher.engine: transformers",
            )


def _probe(length: int, vocab_size: int) -> Row:
    ids_L = (np.arange(length, dtype=np.int32) * 7 + length) % vocab_size
    return Row(sample_id=f"probe of {length}", input_ids_L=ids_L, label_mask_L=np.arange(length) > 0)


def _logits_fraction(settings: TeacherSettings, identity: Teacher, platform: Any) -> float:
    """The share of a device's memory for the logits of a chunk, of which vLLM's own profile does not know."""
    try:
        total = platform.get_device_total_memory()
    except NotImplementedError:
        logger.warning("the device does not say how much memory it has; 5 %% of it are left for logits")
        return 0.05
    itemsize = pick_dtype(identity.dtype).itemsize
    device = torch.device(platform.device_type)
    num_positions = min(settings.chunk_positions, settings.batch_tokens)
    share = logits_bytes(num_positions, identity.vocab_size, itemsize, device) / total
    if share >= settings.vllm.memory_fraction:
        raise ConfigError(
            f"the logits of teacher.chunk_positions, {num_positions}, take {share:.0%} of the device's memory, but "
            f"teacher.vllm.memory_fraction is {settings.vllm.memory_fraction:.0%} for all",
            next_step="lower teacher.chunk_positions",
        )
    return share


def _start(settings: TeacherSettings, identity: Teacher, max_model_len: int) -> Any:
    """vLLM's engine, for prompts of up to `max_model_len` tokens."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return start(
        settings.vllm,
        setting="teacher.engine",
        model=settings.model,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=identity.dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=settings.batch_tokens,
        max_num_seqs=min(settings.vllm.max_rows, settings.batch_tokens),
        gpu_memory_utilization=settings.vllm.memory_fraction - _logits_fraction(settings, identity, current_platform),
        enable_prefix_caching=False,
        worker_extension_cls="teacher_dump.vllm_worker.WorkerExtension",
    )
