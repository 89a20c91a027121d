"""What the teacher said at the positions of a row, most probable first; for people who look into a dataset.

Shapes: P positions, K kept of one position, T declared temperatures.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shared.errors import ConfigError
from shared.rows import Float32, Int32, LogitRow, Row


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the teacher said at the position of token t, the most probable ids first."""

    t: int
    token: int
    realised_logp: float
    entropy: float
    kept_ids_K: Int32
    kept_logp_K: Float32
    tail_logsum_T: Float32

    @property
    def is_weighted(self) -> bool:
        """A threshold sample: the kept carry log weights, unbiased for p, and nothing is known of the rest."""
        return not len(self.tail_logsum_T)

    @property
    def surprise(self) -> float:
        return max(0.0, -self.realised_logp)

    @property
    def rank(self) -> int | None:
        """Of the realised token among the kept, from 0."""
        found = np.flatnonzero(self.kept_ids_K == self.token)
        return int(found[0]) if len(found) else None

    def instead(self) -> tuple[int, float] | None:
        """The most probable other token with its log p (or log weight)."""
        return next((pair for pair in self.kept(2) if pair[0] != self.token), None)

    def kept(self, count: int | None = None) -> list[tuple[int, float]]:
        """The first so many, or all: ids with their log p (or log weight)."""
        return list(zip(self.kept_ids_K[:count].tolist(), self.kept_logp_K[:count].tolist(), strict=True))


@dataclass(frozen=True)
class Spoken:
    """All that the teacher said about one row."""

    said_P: list[Said]

    @staticmethod
    def of(row: Row) -> "Spoken | None":
        """None for a row of text."""
        if not isinstance(row, LogitRow):
            return None
        said_P = []
        only_P = row.teacher.split([1] * row.num_positions)
        for t, token, only in zip((row.source_index_P + 1).tolist(), row.label_ids_P.tolist(), only_P, strict=True):
            order_K = np.argsort(-only.kept_logp_E, kind="stable")
            said = Said(
                t=t,
                token=token,
                realised_logp=float(only.realised_logp_P[0]),
                entropy=float(only.entropy_P[0]),
                kept_ids_K=only.kept_ids_E[order_K],
                kept_logp_K=only.kept_logp_E[order_K],
                tail_logsum_T=only.tail_logsum_PT[0],
            )
            said_P.append(said)
        return Spoken(said_P)

    @cached_property
    def mean_surprise(self) -> float:
        return sum(said.surprise for said in self.said_P) / len(self.said_P) if self.said_P else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean_surprise, 700.0))  # NaN stays NaN

    @property
    def is_weighted(self) -> bool:
        return any(said.is_weighted for said in self.said_P)

    def most_surprising(self, count: int) -> list[Said]:
        return sorted(self.said_P, key=lambda said: -said.surprise)[:count]

    def at(self, t: int, where: str) -> Said:
        """What was said about token t.

        Raises:
            ConfigError: it is not supervised.
        """
        for said in self.said_P:
            if said.t == t:
                return said
        if not self.said_P:
            raise ConfigError(f"{where}: has no supervised token", next_step="choose another --row")
        nearest = min(self.said_P, key=lambda said: abs(said.t - t)).t
        raise ConfigError(
            f"{where}: token {t} is not supervised; {len(self.said_P):,} are, "
            f"the first at t = {self.said_P[0].t}, the last at t = {self.said_P[-1].t}",
            next_step=f"--at {nearest} is the nearest; --tokens lists all",
        )


def require_spoken(row: Row, where: str) -> Spoken:
    spoken = Spoken.of(row)
    if spoken is None:
        raise ConfigError(
            f"{where}: is text, of which no teacher has said anything yet",
            next_step="logit-shards inspect DATASET --at T, once it is dumped",
        )
    return spoken
