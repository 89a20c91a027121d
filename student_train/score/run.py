"""One scoring: every row once through the student, then scores.jsonl and score.json, each whole or not at all.

Shapes: P positions of a row.  Memory: EVALUATE_ROWS rows, and about 300 bytes of scores for each that was done.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared import __version__
from shared.device import pick_device
from shared.errors import ConfigError, NonFiniteError
from shared.files import claim_folder, sha256_of_bytes, write_atomically
from shared.progress import progress
from shared.rows import LogitRow, Row
from student_train.data import require_sources
from student_train.evaluate import EVALUATE_ROWS
from student_train.manner import USUAL_TAGS, Thinking, manner_of
from student_train.objective import Objective
from student_train.ranks import Ranks
from student_train.score.config import ScoreSettings
from student_train.score.rollouts import Marks, read_marks
from student_train.source_protocol import Source
from student_train.student import Student

SCORES_NAME = "scores.jsonl"
SUMMARY_NAME = "score.json"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def run_scoring(settings: ScoreSettings) -> dict[str, Any]:
    """What score.json holds, which is written then, behind the scores.

    Raises:
        ConfigError: the output folder is not ours, rollouts cannot be used, or sample ids come twice.
        MismatchError, RecordError, DamagedDataError: model or data cannot be used; see `student_train.sources`.
        NonFiniteError: the student's logits are no numbers on some row.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("score runs in one process", next_step="start it without torchrun")
    output = Path(settings.output)
    claim_folder(output, [SUMMARY_NAME, SCORES_NAME])
    require_sources(settings.data)
    marks = read_marks(settings.rollouts) if settings.rollouts else None
    student = Student(
        settings.student,
        pick_device(settings.device),
        batch_tokens=settings.batch_tokens,
        packing=settings.packing,
    )
    sources = student.open_sources(settings.data)
    num_rows = _require_unique(sources)
    if marks is not None:
        _require_marks(marks, sources, str(settings.rollouts))
    lines, summary = io.BytesIO(), _Summary()
    with progress("score", num_rows, "rows") as ticker:
        for source in sources:
            for several in _scores(student, source, marks):
                for line in several:
                    lines.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
                    summary.add(line)
                ticker.advance(len(several))
    result = {
        "scores": str(output / SCORES_NAME),
        **summary.numbers(),
        "student": student.identity(),
        "settings": settings.model_dump(mode="json"),
        "scores_sha256": sha256_of_bytes(lines.getbuffer()),
        "version": __version__,
    }
    write_atomically(output / SCORES_NAME, lines.getbuffer())
    write_atomically(output / SUMMARY_NAME, json.dumps(result, indent=1, ensure_ascii=False).encode())
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """A few lines for people."""
    nll, manners = result["nll"], result["manners"]
    counts = ", ".join(f"{count:,} {manner}" for manner, count in manners.items())
    spread = ", ".join(f"{share} of rows below {value:.3f}" for share, value in list(nll["quantiles"].items())[1:-1])
    lines = [
        f"{result['scores']}: {result['rows']:,} rows ({counts}), {result['positions']:,} supervised tokens",
        f"  nll: {nll['of_tokens']:.4f} nats per supervised token; {spread}",
    ]
    if result["pass_rate"] is not None:
        lines.append(f"  pass rate: {100 * result['pass_rate']:.1f} % on average of {result['marked_rows']:,} rows")
    lines.append(f"  next: data.curriculum: {{scores: {result['scores']}, difficulty: nll, order: easy_to_hard}}")
    return lines


def _scores(student: Student, source: Source, marks: Marks | None) -> Iterator[list[dict[str, Any]]]:
    """Of every row of a source, in its order, as many at once as were read."""
    objective = Objective(kd_weight=0.0)
    maker = student.pass_maker(objective, longest_row=source.longest_row, ranks=Ranks())
    thinking = Thinking.of(student.tokenizer.backend_tokenizer, USUAL_TAGS, source.in_pieces)
    marked = None if marks is None else np.stack(marks.of(source.sample_ids), axis=1)
    read = (row for index in range(len(source.sample_ids)) for row in source.read_outline(index))
    done = 0
    while rows := list(islice(read, EVALUATE_ROWS)):
        found: dict[int, NDArray[np.float32]] = {}
        plain = [row.without_teacher() if isinstance(row, LogitRow) else row for row in rows]
        for each, measures in student.measured(maker.make(plain)[0], objective):
            ce_N = measures.of("ce").cpu().numpy()[: sum(each.positions)]
            found |= zip(each.rows, np.split(ce_N, np.cumsum(each.positions)[:-1]), strict=True)
        _require_finite(rows, found)
        lines: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            thinks = source.manners.thinks_R[done + index] if source.manners else thinking.thinks(row)
            line = {
                "sample_id": row.sample_id,
                "source": row.source,
                "tokens": row.num_tokens,
                "positions": row.num_positions,
                "manner": manner_of(bool(thinks)),
                "nll": _mean(found[index]),
                "max_nll": _rounded(found[index].max()),
                **_teachers(row),
                **({} if marked is None else _passed(*marked[done + index].tolist())),
            }
            lines.append(line)
        yield lines
        done += len(rows)


def _teachers(row: Row) -> dict[str, float]:
    if not isinstance(row, LogitRow):
        return {}
    return {"teacher_nll": -_mean(row.teacher.realised_logp_P), "teacher_entropy": _mean(row.teacher.entropy_P)}


def _passed(num_right: int, num_samples: int) -> dict[str, Any]:
    rate = _rounded(num_right / num_samples) if num_samples else None
    failure = None if rate is None else _rounded((num_samples - num_right) / num_samples)
    return {"pass_rate": rate, "failure_rate": failure, "num_samples": num_samples}


class _Summary:
    """What all scores come to."""

    def __init__(self) -> None:
        self._nll: list[float] = []
        self._positions: list[int] = []
        self._pass_rates: list[float] = []
        self._manners: Counter[str] = Counter()

    def add(self, line: dict[str, Any]) -> None:
        self._nll.append(line["nll"])
        self._positions.append(line["positions"])
        self._manners[line["manner"]] += 1
        if line.get("pass_rate") is not None:
            self._pass_rates.append(line["pass_rate"])

    def numbers(self) -> dict[str, Any]:
        nll_R, positions_R = np.array(self._nll), np.array(self._positions)
        values = np.quantile(nll_R, QUANTILES).tolist()
        return {
            "rows": len(nll_R),
            "positions": int(positions_R.sum()),
            "manners": dict(self._manners),
            "nll": {
                "of_rows": float(nll_R.mean()),
                "of_tokens": float((nll_R * positions_R).sum() / positions_R.sum()),
                "quantiles": {f"{100 * share:g} %": value for share, value in zip(QUANTILES, values, strict=True)},
            },
            "marked_rows": len(self._pass_rates),
            "pass_rate": float(np.mean(self._pass_rates)) if self._pass_rates else None,
        }


def _require_unique(sources: Sequence[Source]) -> int:
    """How many rows there are; a curriculum finds a row's score by its sample id."""
    ids = pa.chunked_array([block for source in sources for block in source.sample_ids], pa.string())
    if num_repeats := len(ids) - pc.call_function("count_distinct", [ids]).as_py():
        first = next(each["values"] for each in ids.value_counts().to_pylist() if each["counts"] > 1)
        raise ConfigError(
            f"{num_repeats} sample ids are in several sources of the mix, first {first!r}",
            next_step="score the sources one by one, each into an output of its own",
        )
    if not len(ids):
        raise ConfigError("there are no rows to score", next_step="look at `data`")
    return len(ids)


def _require_marks(marks: Marks, sources: Sequence[Source], rollouts: str) -> None:
    if not sum(int(marks.of(source.sample_ids)[1].sum()) for source in sources):
        first = marks.prompt_ids[0].as_py()
        raise ConfigError(
            f"rollouts: {rollouts}: no marked reply is to a prompt of these rows; the first is to {first!r}",
            next_step="name the rollouts of the rows that are scored",
        )


def _require_finite(rows: Sequence[Row], found: dict[int, NDArray[np.float32]]) -> None:
    names = [row.sample_id for index, row in enumerate(rows) if not np.isfinite(found[index]).all()]
    if names:
        raise NonFiniteError(
            f"the student's logits are no numbers on {len(names)} rows, as {', '.join(names[:8])}",
            next_step="go back to a checkpoint from before, or try student.dtype: float32",
        )


def _mean(values_P: NDArray[np.float32]) -> float:
    return _rounded(values_P.mean(dtype=np.float64))


def _rounded(value: Any) -> float:
    """As many digits as fp32 has, and no more in a file of a million lines."""
    return float(f"{value:.8g}")
