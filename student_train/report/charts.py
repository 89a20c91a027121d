"""Curves over the steps of all stages, as inline SVG.

Drawn by hand, not by a library: plotly and its like put megabytes of script into every page, matplotlib's SVG cannot be
pointed at, and neither lives with a policy that forbids styles of unknown digest.  What is needed is small: polylines
over 1000 x HEIGHT units that stretch to any width, while their labels, which must not stretch, are SVGs of their own.

Shapes: B buckets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from shared.page import escaped
from student_train.report.axes import Axis, Scale, Unit, counted, fitted, round_numbers, spoken, tick_label
from student_train.report.read import Float64
from student_train.report.series import Buckets, Curve

WIDTH, HEIGHT = 1000, 190
X_LABELS = 5
MOST_DOTS = 60
NEAREST_LABELS = 0.11
"""Of the width: no two labels of the steps are nearer."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; of the steps, or of the looks at held-out rows."""

    label: str
    name: str
    colour: Literal["train", "held", "teacher"]
    is_held_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn together."""

    title: str
    note: str
    lines: Sequence[Line]
    unit: Unit = "nats"
    scale: Scale = "linear"
    clips: bool = False
    has_limit: bool = False
    """optimizer.max_grad_norm is drawn as well."""


def _both(name: str, held_out: str, label: str = "training") -> list[Line]:
    held = Line(label="held out", name=held_out, colour="held", is_held_out=True)
    return [Line(label=label, name=name, colour="train"), held]


CHARTS = (
    Chart(title="Cross-entropy", note="of the labels, nats", lines=_both("ce", "ce"), scale="either"),
    Chart(
        title="Divergence from the teacher",
        note="on held-out rows forward KL, nats",
        lines=_both("kd", "kl"),
        scale="either",
    ),
    Chart(
        title="Agreement",
        note="teacher's first choice is the student's",
        lines=_both("agreement", "agreement"),
        unit="share",
    ),
    Chart(
        title="Accuracy",
        note="the label is the student's first choice",
        lines=_both("accuracy", "accuracy"),
        unit="share",
    ),
    Chart(
        title="Kept mass",
        note="on the ids that the dataset keeps",
        lines=[
            Line(label="teacher", name="kept_mass", colour="teacher"),
            Line(label="student", name="student_kept_mass", colour="train"),
        ],
        unit="share",
    ),
    Chart(
        title="Entropy",
        note="of the next token, nats",
        lines=[
            Line(label="teacher", name="teacher_entropy", colour="teacher"),
            Line(label="student", name="student_entropy", colour="train"),
        ],
        scale="either",
    ),
    Chart(
        title="Gradient norm",
        note="before it is clipped",
        lines=[Line(label="norm", name="grad_norm", colour="train")],
        unit="number",
        scale="log",
        has_limit=True,
    ),
    Chart(title="Learning rate", note="", lines=[Line(label="rate", name="lr", colour="train")], unit="number"),
    Chart(
        title="Speed",
        note="tokens per second",
        lines=[Line(label="speed", name="tokens_per_s", colour="train")],
        unit="rate",
        clips=True,
        scale="from zero",
    ),
    Chart(
        title="Model FLOPs utilisation",
        note="",
        lines=[Line(label="MFU", name="mfu", colour="train")],
        unit="share",
        clips=True,
        scale="from zero",
    ),
    Chart(
        title="Lost time and room",
        note="share of a step; of its tokens",
        lines=[
            Line(label="waiting for data", name="wait", colour="train"),
            Line(label="padding", name="waste", colour="teacher"),
        ],
        unit="share",
        clips=True,
        scale="from zero",
    ),
    Chart(
        title="Rollouts",
        note="share of a step's rows",
        lines=[Line(label="rollouts", name="rollouts", colour="train")],
        unit="share",
        scale="from zero",
    ),
    Chart(
        title="Age of the rollouts",
        note="steps since the student that wrote them",
        lines=[Line(label="age", name="stale_steps", colour="train")],
        unit="number",
        scale="from zero",
    ),
    Chart(
        title="Peak memory",
        note="of one process, so far",
        lines=[Line(label="memory", name="peak_bytes", colour="train")],
        unit="bytes",
        scale="from zero",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one look at the held-out rows found."""

    place: float
    stage: int
    step: int
    value: float


def drawn_charts(buckets: Buckets) -> tuple[str, list[dict[str, Any]]]:
    """Every chart that has something to show, as HTML, and what the page's script needs to tell of each."""
    parts, data = [], []
    for chart in CHARTS:
        curves = (
            {line: buckets.curve(line.name) for line in chart.lines if not line.is_held_out} if buckets.count else {}
        )
        points = {line: _points(buckets, line.name) for line in chart.lines if line.is_held_out}
        shown = [line for line in chart.lines if _has_any(curves.get(line), points.get(line))]
        if shown:
            html, lines = _figure(chart, shown, curves, points, buckets, len(parts))
            parts.append(html)
            data.append({"unit": chart.unit, "lines": lines})
    return "\n".join(parts), data


def _has_any(curve: Curve | None, points: Sequence[Point] | None) -> bool:
    return bool((curve and not curve.is_empty) or points)


def _points(buckets: Buckets, name: str) -> list[Point]:
    return [
        Point(place=buckets.place(number, step), stage=number, step=step, value=value)
        for number, stage in enumerate(buckets.stages)
        for step, value in zip(*stage.held(name), strict=True)
    ]


def _figure(
    chart: Chart,
    shown: Sequence[Line],
    curves: dict[Line, Curve],
    points: dict[Line, list[Point]],
    buckets: Buckets,
    number: int,
) -> tuple[str, list[dict[str, Any]]]:
    axis = _axis(chart, shown, curves, points)
    drawing, keys, data = [_grid(axis), _marks(buckets), _limits(chart, axis, buckets)], [], []
    for line in shown:
        if line.is_held_out:
            held = points[line]
            drawing.append(_held_path(axis, held, line.colour))
            last = held[-1].value
            data.append({"held": [[look.stage, look.step, _brief(look.value)] for look in held]})
        else:
            curve = curves[line]
            extremes = _pieces(axis, buckets, [curve.low_B, curve.high_B])
            drawing.append(_path(extremes, f"raw {line.colour}"))
            drawing.append(_path(_pieces(axis, buckets, [curve.smooth_B]), f"smooth {line.colour}"))
            last = curve.last()
            data.append(_told(curve, buckets))
        key = f'<i class="{line.colour}"></i>{escaped(line.label)} <b>{escaped(spoken(last, chart.unit))}</b>'
        keys.append(f"<span>{key}</span>")
    scale = " · logarithmic" if axis.is_log else ""
    note = f"<small>{escaped(chart.note)}{scale if chart.note else scale[3:]}</small>"
    html = (
        f'<figure class="chart" id="chart{number}" tabindex="0">\n'
        f"<figcaption><strong>{escaped(chart.title)}</strong> {note}</figcaption>\n"
        f'<p class="keys">{" ".join(keys)}</p>\n<div class="plot">\n{_stage_names(buckets)}'
        f"{_y_labels(axis, chart.unit)}\n"
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(chart.title)} over the steps">{"".join(drawing)}</svg>\n'
        f"{_x_labels(buckets)}\n</div>\n</figure>"
    )
    return html, data


def _axis(chart: Chart, shown: Sequence[Line], curves: dict[Line, Curve], points: dict[Line, list[Point]]) -> Axis:
    parts = [np.array([each.value for each in points[line]]) for line in shown if line.is_held_out]
    for line in shown:
        if not line.is_held_out:
            parts += [curves[line].usual_low_B, curves[line].usual_high_B]
    return fitted(np.concatenate(parts), scale=chart.scale, clips=chart.clips, is_binary=chart.unit == "bytes")


def _x(place: float) -> str:
    return f"{WIDTH * place:.1f}".removesuffix(".0")


def _y(axis: Axis, value: float) -> str:
    return f"{HEIGHT * (1 - min(max(axis.place(value), -0.02), 1.02)):.1f}".removesuffix(".0")


def _grid(axis: Axis) -> str:
    lines = "".join(f"M0 {_y(axis, tick)}H{WIDTH}" for tick in axis.ticks())
    return f'<path class="grid" d="{lines}"/>'


def _marks(buckets: Buckets) -> str:
    """Borders between stages, steps that went wrong, and looks at the held-out rows."""
    borders = "".join(f"M{_x(offset / buckets.total)} 0V{HEIGHT}" for offset in buckets.offsets[1:])
    bad, looks = set[int](), set[int]()  # whole units: thousands of them are no more than there is room for
    for number, stage in enumerate(buckets.stages):
        bad |= {round(WIDTH * buckets.place(number, step)) for step in stage.step_S[stage.bad_S].tolist()}
        looks |= {round(WIDTH * buckets.place(number, step)) for step in stage.looks}
    paths = {
        "border": borders,
        "bad": "".join(f"M{x} 0V{HEIGHT}" for x in sorted(bad)),
        "look": "".join(f"M{x} {HEIGHT}v-5" for x in sorted(looks)),
    }
    return "".join(f'<path class="{name}" d="{d}"/>' for name, d in paths.items() if d)


def _limits(chart: Chart, axis: Axis, buckets: Buckets) -> str:
    """Where gradients are clipped."""
    if not chart.has_limit:
        return ""
    parts = []
    for number, stage in enumerate(buckets.stages):
        limit = stage.settings.optimizer.max_grad_norm
        if 0 <= axis.place(limit) <= 1:
            ends = (_x(buckets.place(number, 0)), _x(buckets.place(number, stage.steps)))
            parts.append(f"M{ends[0]} {_y(axis, limit)}H{ends[1]}")
    return f'<path class="limit" d="{"".join(parts)}"/>' if parts else ""


def _path(pieces: Sequence[Sequence[tuple[str, str]]], classes: str) -> str:
    """Polylines; one of a single point is a dot."""
    d = "".join(
        f"M{' '.join(piece[0])}" + ("h0" if len(piece) == 1 else "L" + " ".join(f"{x} {y}" for x, y in piece[1:]))
        for piece in pieces
        if piece
    )
    return f'<path class="{classes}" d="{d}"/>' if d else ""


def _pieces(axis: Axis, buckets: Buckets, curves: Sequence[Float64]) -> list[list[tuple[str, str]]]:
    """Through the values of each bucket; broken where there is none, and where a stage ends."""
    pieces: list[list[tuple[str, str]]] = [[]]
    before = -1
    for stage, place, *values in zip(buckets.stage_B.tolist(), buckets.places().tolist(), *curves, strict=True):
        ys = list(dict.fromkeys(_y(axis, value) for value in values if not math.isnan(axis.place(value))))
        if stage != before or not ys:
            pieces.append([])
        pieces[-1] += [(_x(place), y) for y in ys]
        before = stage
    return pieces


def _held_path(axis: Axis, points: Sequence[Point], colour: str) -> str:
    """A line through the looks of each stage, and a dot for each of them."""
    pieces: dict[int, list[tuple[str, str]]] = {}
    for each in points:
        if not math.isnan(axis.place(each.value)):
            pieces.setdefault(each.stage, []).append((_x(each.place), _y(axis, each.value)))
    dots = [[point] for piece in pieces.values() for point in piece] if len(points) <= MOST_DOTS else []
    return _path(list(pieces.values()), f"smooth {colour}") + _path(dots, f"dots {colour}")


def _y_labels(axis: Axis, unit: Unit) -> str:
    ticks = axis.ticks()
    step = min((high - low for low, high in pairwise(ticks)), default=1.0)
    labels = [
        f'<text x="52" y="{_y(axis, tick)}" dy=".32em">{tick_label(tick, unit, tick if axis.is_log else step)}</text>'
        for tick in ticks
    ]
    return f'<svg class="ys" width="56" height="{HEIGHT}" aria-hidden="true">{"".join(labels)}</svg>'


def _stage_names(buckets: Buckets) -> str:
    """Where there are several stages, and room."""
    if len(buckets.stages) == 1:
        return ""
    names = [
        f'<text x="{100 * offset / buckets.total:.2f}%" dx="3" y="11">{escaped(_cut(stage.name))}</text>'
        for offset, stage in zip(buckets.offsets, buckets.stages, strict=True)
        if stage.steps >= NEAREST_LABELS * buckets.total
    ]
    return f'<svg class="names" height="15" aria-hidden="true">{"".join(names)}</svg>\n'


def _cut(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"


def _x_labels(buckets: Buckets) -> str:
    """Each stage counts its own steps."""
    ticks = round_numbers(0, buckets.total, X_LABELS)
    step = max(ticks[1] - ticks[0], 1) if len(ticks) > 1 else 1
    labels, before = [], -1.0
    for number, stage in enumerate(buckets.stages):
        begin = buckets.offsets[number] / buckets.total
        end = (buckets.offsets[number] + stage.steps) / buckets.total
        for tick in np.arange(step if number else 0, stage.steps + 1, step).tolist():
            place = begin + tick / buckets.total
            crosses = number + 1 < len(buckets.stages) and end - place < NEAREST_LABELS / 2
            if place - before >= NEAREST_LABELS and not crosses:
                anchor = ' class="first"' if place == 0 else ' class="last"' if place > 0.97 else ""
                labels.append(f'<text x="{100 * place:.2f}%" y="13"{anchor}>{counted(tick)}</text>')
                before = place
    return f'<svg class="x" height="18" aria-hidden="true">{"".join(labels)}</svg>'


def _told(curve: Curve, buckets: Buckets) -> dict[str, Any]:
    """Values by bucket; without the extremes where a bucket is one step and its own mean."""
    told = {"smooth": [_brief(value) for value in curve.smooth_B.tolist()]}
    low = [_brief(value) for value in curve.low_B.tolist()]
    high = [_brief(value) for value in curve.high_B.tolist()]
    return told | ({"raw": low} if buckets.are_steps else {"low": low, "high": high})


def _brief(value: float) -> float | None:
    """Four digits."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
