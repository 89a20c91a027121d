"""Draws of tokens that depend on a name alone: not on the batch they are made in, nor on what was drawn before.

The s-th token of a reply comes from the s-th number of a stream of its own, which a name seeds, by the inverse of the
distribution function.  So a run that was stopped, or met less memory, or shares its work with others, writes what it
would have written, up to the last bits of logits, which are another device's or batch size's own.

Shapes: B rows of a batch, S steps, V vocabulary.  Memory: a few times B * V floats; no step's logits are kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

BELOW_ONE = 1 - 2**-23
"""The next number in fp32."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """From which distribution: the model's at `temperature`, its `top_k` largest, of these the least that have `top_p`.

    Temperature 0 is the most probable token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def warpers(self) -> LogitsProcessorList:
        """What logits go through before a token is drawn."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


class Draws(LogitsProcessor):
    """Replies of one batch: leaves of every step's logits nothing but the token that is drawn.

    Keeps log p of what it draws, at T = 1 and before anything is cut.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[str], num_steps: int, device: torch.device) -> None:
        self._warpers = None if sampling.is_greedy else sampling.warpers()
        numbers_BS = [[]] if sampling.is_greedy else np.stack([uniform_numbers(key, num_steps) for key in keys])
        self._number_BS = torch.as_tensor(numbers_BS, dtype=torch.float32, device=device)
        self._logp_SB: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_BV = scores.float()
        if self._warpers is None:
            drawn_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            number_B1 = self._number_BS[:, len(self._logp_SB), None]
            warped_BV: Any = self._warpers(input_ids, logits_BV)  # pyright: ignore[reportArgumentType]
            drawn_B1 = drawn(warped_BV.softmax(-1), number_B1)
        self._logp_SB.append(logits_BV.gather(-1, drawn_B1)[:, 0] - logits_BV.logsumexp(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn_B1, 0.0)

    def nll(self, num_tokens: Sequence[int]) -> list[float]:
        """Mean of −log p over the first so many tokens of each row."""
        logp_BS = torch.stack(self._logp_SB, dim=1).cpu()
        return [-float(logp_S[:count].double().mean()) for logp_S, count in zip(logp_BS, num_tokens, strict=True)]


def drawn(probability_BV: Tensor, number_B1: Tensor) -> Tensor:
    """The token of each row, [B, 1]: the first at which the sum of probabilities exceeds the row's number in [0, 1)."""
    sum_BV = probability_BV.cumsum(-1)
    wanted_B1 = number_B1 * (sum_BV[:, -1:] * BELOW_ONE)  # the total itself would find none
    # Of probabilities that are no numbers nothing can be drawn, and their mean is no number either.
    return torch.searchsorted(sum_BV, wanted_B1, right=True).clamp_(max=sum_BV.shape[-1] - 1)


def uniform_numbers(key: str, count: int) -> np.ndarray:
    """Numbers in [0, 1), always the same for a key; the first ones of a longer stream are those of a shorter one."""
    return np.random.Generator(np.random.Philox(seed_of(key))).random(count, dtype=np.float32)


def seed_of(key: str) -> int:
    """63 bits of a digest."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
