"""Rows of a dataset scored again by the live teacher: is what is stored what this teacher says?

Every chosen row is scored twice, the second time in halves, so that it shares its forward pass with fewer others.
The first time is compared with the dataset; the second with the first, as a control: what the engine itself varies by.
A shift by one, another checkpoint or a wrong template would show in nats, where rounding and engines differ by
thousandths.

The live teacher keeps twice as many ids, so that what is stored is nearly always among them; what is not goes to the
tail on both sides, by logaddexp, so the KL is that of the same outcomes.
"""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.dataset import LogitDataset
from shared.errors import MismatchError
from shared.rows import LogitRow, Positions, Row
from teacher_dump.config import TeacherSettings
from teacher_dump.engines import open_engine, teacher_identity
from teacher_dump.keep import TopK
from teacher_dump.scoring import Engine, require_finite

SAME_TEACHER = ("architecture", "vocab_size", "revision", "config_sha256", "weights_sha256")

TOLERANCE = 0.02
"""Nats.  bfloat16 in place of fp32 costs less than this."""
LEAST_FOUND = 0.9
"""The live teacher keeps twice as many ids: what it does not keep at all, it does not hold for probable."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two scorings of the same positions, in nats; kl is null where ids are sampled."""

    found: float
    """Share of the kept ids of the one that the other keeps too."""
    realised_mean: float
    realised_largest: float
    kept_mean: float
    kept_largest: float
    kl_mean: float | None
    kl_largest: float | None


@dataclass(frozen=True, kw_only=True)
class Rescored:
    rows: int
    positions: int
    engine: str
    stored: Difference
    """What is stored against the live teacher."""
    control: Difference
    """The live teacher against itself."""


def teacher_of(dataset: LogitDataset) -> dict[str, Any]:
    """The settings of a dataset's teacher as far as its manifest knows them."""
    teacher = dataset.manifest.teacher
    engine = (teacher.engine or "transformers").split()[0]
    tree: dict[str, Any] = {"model": teacher.name, "dtype": teacher.dtype, "engine": engine}
    if teacher.engine_settings:
        arguments = dict(teacher.engine_settings)
        tree["vllm"] = {"quantization": arguments.pop("quantization", None), "engine_args": arguments}
    return tree if teacher.revision is None else tree | {"revision": teacher.revision}


def rescore(
    dataset: LogitDataset,
    settings: TeacherSettings,
    *,
    num_rows: int,
    seed: int = 0,
    load: Callable[..., AbstractContextManager[Engine]] = open_engine,
) -> Rescored:
    """Score `num_rows` rows of the dataset, drawn by `seed`, again.

    Raises:
        MismatchError: the teacher is not the one of the dataset.
        DamagedShardError: a shard is damaged.
    """
    manifest = dataset.manifest
    identity = teacher_identity(settings)
    for name in SAME_TEACHER:
        expected, got = getattr(manifest.teacher, name), getattr(identity, name)
        if expected is not None and expected != got:
            raise MismatchError(
                f"{dataset.folder} is of a teacher with {name} {expected}, but {settings.model} has {got}",
                next_step="name the dataset's teacher with --set teacher.model=…",
            )
    rows = _drawn(dataset, num_rows, seed)
    bare = [Row(**{name: getattr(row, name) for name in Row.__dataclass_fields__}) for row in rows]
    tokenizer = dataset.tokenizer()
    always = (tokenizer.token_to_id(token) for token in manifest.keep["always"])
    always_ids = tuple(sorted({token_id for token_id in always if token_id is not None}))
    most_kept = manifest.keep["k"] if manifest.keep["method"] == "topk" else math.ceil(1 / manifest.keep["tau"])
    min_prob = manifest.keep.get("min_prob", 0.0) / 4
    rule = TopK(k=min(2 * most_kept, identity.vocab_size), min_prob=min_prob, always_ids=always_ids)
    units = [bare, bare[::2], bare[1::2]]
    longest = max(row.num_tokens for row in bare)
    with load(settings, identity, rule, manifest.temperatures, longest_row=longest) as engine:
        first, even, odd = engine.score(units)
    again = [half[index // 2] for index, half in enumerate((even, odd) * len(bare)) if index < len(bare)]
    for row, positions in zip(bare, first, strict=True):
        require_finite(row, positions)
    weight = float(np.float32(math.log(manifest.keep["tau"]))) if manifest.keep["method"] == "threshold" else None
    return Rescored(
        rows=len(bare),
        positions=sum(row.num_positions for row in bare),
        engine=identity.engine or settings.engine,
        stored=_difference([row.teacher for row in rows], first, weight),
        control=_difference(first, again, weight),
    )


def _drawn(dataset: LogitDataset, num_rows: int, seed: int) -> list[LogitRow]:
    """Rows drawn without replacement, in the order of the dataset; only shards with one of them are read."""
    counts = [shard.rows for shard in dataset.manifest.shards]
    drawn = sorted(random.Random(seed).sample(range(sum(counts)), min(num_rows, sum(counts))))
    rows: list[LogitRow] = []
    begin = 0
    for index, count in enumerate(counts):
        wanted = {number - begin for number in drawn if begin <= number < begin + count}
        if wanted:
            rows += [row for place, row in enumerate(dataset.read_shard(index)) if place in wanted]
        begin += count
    return rows


def _difference(some: Sequence[Positions], others: Sequence[Positions], weight: float | None) -> Difference:
    """Of the ids that `some` keep.  Where ids are sampled, `weight` is the log weight of those, which say nothing of
    their probability; all that is more probable than that is stored as it is."""
    one, other = Positions.concatenate(some), Positions.concatenate(others)
    position_E, at_E = _places(one, other)
    is_wanted_E = np.ones(len(at_E), dtype=bool) if weight is None else one.kept_logp_E > np.float32(weight)
    is_common_E = is_wanted_E & (at_E >= 0)
    kept_E = np.abs(one.kept_logp_E.astype(np.float64) - other.kept_logp_E[at_E])[is_common_E]
    realised_P = np.abs(one.realised_logp_P.astype(np.float64) - other.realised_logp_P)
    kl_P = None if weight is not None else _kl(one, other, position_E, at_E)
    return Difference(
        found=float(is_common_E.sum() / max(1, is_wanted_E.sum())),
        realised_mean=float(realised_P.mean()),
        realised_largest=float(realised_P.max()),
        kept_mean=float(kept_E.mean()) if len(kept_E) else 0.0,
        kept_largest=float(kept_E.max(initial=0.0)),
        kl_mean=None if kl_P is None else float(kl_P.mean()),
        kl_largest=None if kl_P is None else float(kl_P.max()),
    )


def _places(one: Positions, other: Positions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every kept entry of `one` its position, and where `other` keeps the same id there; −1 where it does not."""
    position_E = np.repeat(np.arange(one.num_positions), one.kept_counts_P)
    stride = 1 + int(max(one.kept_ids_E.max(initial=0), other.kept_ids_E.max(initial=0)))
    other_position_E = np.repeat(np.arange(other.num_positions), other.kept_counts_P)
    keys_E = other_position_E * stride + other.kept_ids_E  # ascend, since ids do within a position
    wanted_E = position_E * stride + one.kept_ids_E
    at_E = np.minimum(np.searchsorted(keys_E, wanted_E), len(keys_E) - 1)
    return position_E, np.where(keys_E[at_E] == wanted_E, at_E, -1)


def _kl(one: Positions, other: Positions, position_E: NDArray[np.int64], at_E: NDArray[np.int64]) -> Floats:
    """KL(one ‖ other) at every position in fp64, over the ids that both keep and one lump of all others."""
    is_common_E = at_E >= 0
    p_tail_P = _tail(one, position_E, ~is_common_E)
    is_common_of_other_E = np.zeros(len(other.kept_ids_E), dtype=bool)
    is_common_of_other_E[at_E[is_common_E]] = True
    other_position_E = np.repeat(np.arange(other.num_positions), other.kept_counts_P)
    q_tail_P = _tail(other, other_position_E, ~is_common_of_other_E)
    position_C = position_E[is_common_E]
    logp_C = one.kept_logp_E[is_common_E].astype(np.float64)
    logq_C = other.kept_logp_E[at_E[is_common_E]].astype(np.float64)
    p_norm_P = _total(position_C, logp_C, p_tail_P)
    q_norm_P = _total(position_C, logq_C, q_tail_P)
    kl_P = np.zeros(one.num_positions)
    logp_C, logq_C = logp_C - p_norm_P[position_C], logq_C - q_norm_P[position_C]
    np.add.at(kl_P, position_C, np.exp(logp_C) * (logp_C - logq_C))
    has_tail_P = np.isfinite(p_tail_P)
    tail_p_P, tail_q_P = (p_tail_P - p_norm_P)[has_tail_P], (q_tail_P - q_norm_P)[has_tail_P]
    kl_P[has_tail_P] += np.exp(tail_p_P) * (tail_p_P - tail_q_P)
    return np.maximum(kl_P, 0.0)


def _tail(positions: Positions, position_E: NDArray[np.int64], is_folded_E: NDArray[np.bool_]) -> Floats:
    """The tail at T = 1 together with some of the kept entries."""
    tail_P = positions.tail_logsum_PT[:, 0].astype(np.float64)
    np.logaddexp.at(tail_P, position_E[is_folded_E], positions.kept_logp_E[is_folded_E].astype(np.float64))
    return tail_P


def _total(position_C: NDArray[np.int64], logp_C: Floats, tail_P: Floats) -> Floats:
    total_P = tail_P.copy()
    np.logaddexp.at(total_P, position_C, logp_C)
    return total_P


def require_agreement(rescored: Rescored, name: str) -> None:
    """Raises MismatchError where the live teacher says something else than what is stored, rounding and noise aside."""
    stored, control = rescored.stored, rescored.control
    # Not the realised tokens: a token that is next to impossible is stored coarsely.
    what = "KL" if stored.kl_mean is not None else "difference in log p of kept ids"
    differs, varies = (each.kept_mean if each.kl_mean is None else each.kl_mean for each in (stored, control))
    if differs > TOLERANCE + 10 * varies or stored.found < LEAST_FOUND:
        raise MismatchError(
            f"{name}: the {what} between what is stored and the live teacher is {differs:.3g} nats on average, "
            f"between the live teacher and itself {varies:.3g}; of the stored ids {100 * stored.found:.1f} % are among "
            "its most probable",
            next_step="rounding and engines do not explain it: look for another checkpoint, and do not train on this",
        )


def describe(rescored: Rescored) -> list[str]:
    """For people."""
    lines = [f"{rescored.rows:,} rows, {rescored.positions:,} positions, scored twice by {rescored.engine}"]
    header = f"{'nats, mean / largest':22} {'stored - live':>22} {'live - live again':>22}"
    lines.append(header)
    stored, control = asdict(rescored.stored), asdict(rescored.control)
    for name, what in (("realised", "|log p| realised token"), ("kept", "|log p| kept ids"), ("kl", "KL")):
        cells = [
            "-" if each[f"{name}_mean"] is None else f"{each[f'{name}_mean']:.2e} / {each[f'{name}_largest']:.2e}"
            for each in (stored, control)
        ]
        lines.append(f"{what:22} {cells[0]:>22} {cells[1]:>22}")
    found = [f"{100 * each['found']:.2f} %" for each in (stored, control)]
    lines.append(f"{'kept ids found':22} {found[0]:>22} {found[1]:>22}")
    return lines
