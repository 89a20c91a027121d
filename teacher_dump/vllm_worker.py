"""What runs inside vLLM's workers: stored values are computed there, where hidden states and output matrix are.

vLLM's own log-probabilities of a prompt become one Python object for each id.  Here nothing leaves the worker but
arrays of what is stored, at supervised positions only.

The place: `GPUModelRunner._get_prompt_logprobs_dict`, which every forward pass of vLLM's first model runner (and of
vllm-ascend's) ends with, on the ranks that have hidden states.  It gets those of all scheduled tokens, one request
after the other.  What a request asks for comes with its sampling parameters, so that no other state has to be kept
in step: a request may be prefilled in parts, and after a preemption once more from its start.

Importing this module imports no vLLM: the same file is read by the process that starts the workers.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.rows import Positions, Row
from teacher_dump.keep import Threshold, TopK
from teacher_dump.scoring import Asked, Scorer

ASKED = "logitferry"
"""Key of `SamplingParams.extra_args`."""
HOOK = "_get_prompt_logprobs_dict"
FIELDS: dict[str, str] = {
    "kept_counts_P": "<i4",
    "kept_ids_E": "<i4",
    "kept_logp_E": "<f4",
    "realised_logp_P": "<f4",
    "entropy_P": "<f4",
    "tail_logsum_PT": "<f4",
}


def request_of(row: Row, rule: TopK | Threshold, request_id: str) -> dict[str, Any]:
    """What a request asks for, as vLLM carries it to its workers: texts and bytes.

    The id is ours: vLLM adds something to those that it is given.
    """
    asked = Asked.of([row], rule)
    return {
        "id": request_id,
        "source": row.source_index_P.astype("<i8").tobytes(),
        "label": asked.label_N.astype("<i8").tobytes(),
        "draws": None if asked.draws_N is None else asked.draws_N.astype("<f8").tobytes(),
    }


def pack(positions: Positions) -> list[bytes]:
    """Positions as bytes, one piece for each field, which vLLM carries between processes without pickling."""
    return [getattr(positions, name).astype(kind).tobytes() for name, kind in FIELDS.items()]


def unpack(pieces: list[bytes]) -> Positions:
    arrays: dict[str, Any] = {
        name: np.frombuffer(piece, dtype=kind) for (name, kind), piece in zip(FIELDS.items(), pieces, strict=True)
    }
    arrays["tail_logsum_PT"] = arrays["tail_logsum_PT"].reshape(len(arrays["kept_counts_P"]), -1)
    return Positions(**arrays)


@dataclass
class _Request:
    source_P: np.ndarray[Any, Any]
    """Input positions t-1, ascending."""
    label_P: np.ndarray[Any, Any]
    draws_P: np.ndarray[Any, Any] | None
    parts: list[Positions] = field(default_factory=list)
    done: int = 0
    """Positions computed, on this rank or another of its group."""


class WorkerExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`); its methods are called by `collective_rpc`."""

    model_runner: Any
    _logitferry: "_Capture"

    def logitferry_begin(self, rule: dict[str, Any], temperatures: list[float], sizes: dict[str, int]) -> str | None:
        """Compute stored values from now on; why it cannot be done, where it cannot.

        `rule` holds the fields of `TopK` or `Threshold`, `sizes` vocab_size and chunk_positions.
        """
        hook = getattr(self.model_runner, HOOK, None)
        if hook is None or len(inspect.signature(hook).parameters) != 2:
            return f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__} has no {HOOK}(hidden, n)"
        if missing := [name for name in ("requests", "input_batch") if not hasattr(self.model_runner, name)]:
            return f"{type(self.model_runner).__name__} has no {missing[0]}"
        fields: dict[str, Any] = {**rule, "always_ids": tuple(rule["always_ids"])}
        scorer = Scorer(Threshold(**fields) if "tau" in fields else TopK(**fields), temperatures, **sizes)
        self._logitferry = _Capture(self.model_runner, hook, scorer)
        setattr(self.model_runner, HOOK, self._logitferry)
        return None

    def logitferry_take(self, request_ids: list[str]) -> dict[str, list[bytes]]:
        """The stored values of finished requests, on the one rank that has them; elsewhere nothing."""
        return self._logitferry.take(request_ids)

    def logitferry_chunk_positions(self) -> int:
        """How many positions' logits live at once by now."""
        scorer = self._logitferry.scorer
        return min(scorer.chunk.size, scorer.in_step_rows.size)


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank  # pyright: ignore[reportMissingImports]

    return get_tensor_model_parallel_rank()


class _Capture:
    """Stands where `_get_prompt_logprobs_dict` stood."""

    def __init__(self, runner: Any, original: Any, scorer: Scorer) -> None:
        self._runner, self._original, self.scorer = runner, original, scorer
        self._requests: dict[str, _Request] = {}
        parallel = runner.parallel_config
        self._in_step_with_others = parallel.tensor_parallel_size > 1
        self._is_first_rank = not self._in_step_with_others or _tensor_parallel_rank() == 0

    @torch.inference_mode()
    def __call__(self, hidden_states: Tensor, scheduled: Any) -> Any:
        """`scheduled` tells for each request how many tokens the pass had of it; older runners give it wrapped."""
        num_scheduled: dict[str, int] = getattr(scheduled, "num_scheduled_tokens", scheduled)
        places: list[np.ndarray[Any, Any]] = []
        pieces: list[tuple[_Request, slice]] = []
        offset = 0
        for request_id in self._runner.input_batch.req_ids:
            count = num_scheduled.get(request_id, 0)
            state = self._runner.requests[request_id]
            begin = int(state.num_computed_tokens)
            if (request := self._request(state)) is not None:
                is_complete = request.done == len(request.source_P)
                if begin == 0 and not is_complete:
                    request.parts, request.done = [], 0  # for the first time, or again after a preemption
                first, last = np.searchsorted(request.source_P, [begin, begin + count])
                if last > first and not is_complete:
                    places.append(request.source_P[first:last] - begin + offset)
                    pieces.append((request, slice(int(first), int(last))))
            offset += count
        if places:
            self._score(hidden_states[torch.from_numpy(np.concatenate(places)).to(hidden_states.device)], pieces)
        return self._original(hidden_states, scheduled)

    def _score(self, hidden_ND: Tensor, pieces: list[tuple[_Request, slice]]) -> None:
        draws = [request.draws_P[at] for request, at in pieces if request.draws_P is not None]
        asked = Asked(
            label_N=np.concatenate([request.label_P[at] for request, at in pieces]),
            draws_N=np.concatenate(draws) if draws else None,
        )
        positions = self.scorer.score(hidden_ND, asked, self._logits_of, in_step_with_others=self._in_step_with_others)
        for request, at in pieces:  # on every rank alike, since it decides what is computed next
            assert request.done == at.start, f"positions {at} of a request came after {request.done}"
            request.done = at.stop
        if positions is not None:
            parts = positions.split([at.stop - at.start for _, at in pieces])
            for (request, _), part in zip(pieces, parts, strict=True):
                request.parts.append(part)

    def _logits_of(self, hidden_ND: Tensor) -> Tensor | None:
        """On every rank, since they compute them together; kept on the first, although all may have them."""
        logits_NV = self._runner.model.compute_logits(hidden_ND)
        return logits_NV if self._is_first_rank else None

    def _request(self, state: Any) -> _Request | None:
        asked = (getattr(state.sampling_params, "extra_args", None) or {}).get(ASKED)
        if asked is None:
            return None
        if (request_id := asked["id"]) not in self._requests:
            draws = asked["draws"]
            self._requests[request_id] = _Request(
                source_P=np.frombuffer(asked["source"], dtype="<i8"),
                label_P=np.frombuffer(asked["label"], dtype="<i8"),
                draws_P=None if draws is None else np.frombuffer(draws, dtype="<f8"),
            )
        return self._requests[request_id]

    def take(self, request_ids: list[str]) -> dict[str, list[bytes]]:
        requests = {request_id: self._requests.pop(request_id, None) for request_id in request_ids}
        return {
            request_id: pack(Positions.concatenate(request.parts))
            for request_id, request in requests.items()
            if request is not None and request.parts
        }
