"""Does a list predict the token that it is said to predict?  The oldest mistake of this trade, found before it is made.

A teacher's list holds the token that came far more often than the one before or after it.  So every list is laid
against the tokens at several offsets, and another offset that is clearly better than the one that was asked for is an
error: a share of hits that is higher by `CLEAR` and by three standard errors, and a higher mean log p as well.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.errors import MismatchError
from shared.exchange.lists import ForeignRow
from shared.exchange.unsaid import LEAST_LEFT

OFFSETS = (-1, 0, 1, 2)
CLEAR = 0.05


@dataclass(kw_only=True)
class Alignment:
    """Counts over all lists that have a token at each of the offsets."""

    lists: int = 0
    hits: Any = field(default_factory=lambda: np.zeros(len(OFFSETS)))
    logp: Any = field(default_factory=lambda: np.zeros(len(OFFSETS)))
    """Σ log p of the token where the list has it, and of all that the list leaves out where not."""

    def add(self, row: ForeignRow) -> None:
        indices = np.flatnonzero(row.counts_L)
        indices = indices[(indices + OFFSETS[0] >= 0) & (indices + OFFSETS[-1] < len(row.input_ids_L))]
        if not len(indices):
            return
        list_E = np.repeat(np.arange(len(row.counts_L)), row.counts_L)
        mass_L = np.bincount(list_E, np.exp(row.logp_E.astype(np.float64)), len(row.counts_L))
        rest_L = np.log(np.maximum(1 - mass_L, LEAST_LEFT))
        is_used_E = np.isin(list_E, indices)
        list_E, ids_E, logp_E = list_E[is_used_E], row.ids_E[is_used_E], row.logp_E[is_used_E]
        self.lists += len(indices)
        for number, offset in enumerate(OFFSETS):
            is_hit_E = ids_E == row.input_ids_L[list_E + offset]
            self.hits[number] += is_hit_E.sum()
            self.logp[number] += logp_E[is_hit_E].sum() + rest_L[np.setdiff1d(indices, list_E[is_hit_E])].sum()

    def summary(self) -> dict[str, dict[str, float]]:
        """For each offset the share of lists that hold the token there, and its mean log p."""
        lists = max(self.lists, 1)
        return {
            f"{offset}": {
                "share_in_list": round(float(self.hits[n]) / lists, 4),
                "mean_logprob": round(float(self.logp[n]) / lists, 4),
            }
            for n, offset in enumerate(OFFSETS)
        }

    def is_telling(self, offset: int) -> bool:
        """Whether the offset is clearly better than all others."""
        mine = OFFSETS.index(offset)
        return all(self._is_clearly_better(mine, other) for other in range(len(OFFSETS)) if other != mine)

    def require(self, offset: int, where: str) -> None:
        """Raises MismatchError where another offset is clearly better."""
        mine, best = OFFSETS.index(offset), int(self.hits.argmax())
        if best == mine or not self._is_clearly_better(best, mine):
            return
        found = self.summary()
        lines = "\n".join(
            f"  token i{offset:+d}: in {each['share_in_list']:.1%} of the lists, mean log p {each['mean_logprob']:.2f}"
            for offset, each in zip(OFFSETS, found.values(), strict=True)
        )
        raise MismatchError(
            f"{where}: the list at index i was to be about token i{offset:+d}, but it is about token "
            f"i{OFFSETS[best]:+d}; of {self.lists} lists\n{lines}",
            next_step=f"import with --offset {OFFSETS[best]}",
        )

    def _is_clearly_better(self, one: int, other: int) -> bool:
        if not self.lists:
            return False
        difference = (self.hits[one] - self.hits[other]) / self.lists
        return bool(difference > max(CLEAR, 3 / math.sqrt(self.lists)) and self.logp[one] > self.logp[other])
