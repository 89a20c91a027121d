"""Tables of the page: stages, measures of evaluations, the curves as numbers, answers, tasks and settings."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel

from shared.amounts import duration
from shared.config import Settings, settings_yaml
from shared.page import escaped
from student_train.evaluation import Means
from student_train.report.axes import Unit, spoken
from student_train.report.charts import CHARTS, Line
from student_train.report.checks import share_of_time
from student_train.report.evals import ExactMatch, Example, Look, Task
from student_train.report.read import Float64, Stage
from student_train.report.series import Buckets

TOLD_STEPS = 12
TOLD_LOOKS = 24
MEASURES: dict[str, tuple[str, Unit]] = {
    "positions": ("supervised tokens", "rate"),
    "ce": ("cross-entropy, nats", "nats"),
    "kl": ("KL to the teacher, nats", "nats"),
    "accuracy": ("accuracy", "share"),
    "agreement": ("agreement with the teacher", "share"),
    "ece": ("calibration error", "number"),
    "student_entropy": ("entropy, student, nats", "nats"),
    "teacher_entropy": ("entropy, teacher, nats", "nats"),
    "student_kept_mass": ("kept mass, student", "share"),
    "kept_mass": ("kept mass, teacher", "share"),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: str = "") -> str:
    """Texts; the first column names the row, the others are numbers unless the class says otherwise."""
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows if any(row[1:])
    )
    attribute = f' class="{classes}"' if classes else ""
    inside = f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table{attribute}>\n{inside}</table></div>\n'


def teaching(stage: Stage) -> str:
    """What the stage learns from: labels, or labels and a teacher."""
    loss = stage.settings.loss
    if not loss.kd_weight:
        return "SFT"
    temperature = "" if loss.temperature == 1 else f", T {loss.temperature:g}"
    return f"KD, {loss.kd_weight:g} × {loss.divergence.replace('_', ' ').replace('kl', 'KL')}{temperature}"


def data_names(stage: Stage) -> list[str]:
    """The datasets or text files."""
    names = []
    for source in stage.settings.data.sources():
        names += [source.dataset] if source.dataset else list(source.text.files) if source.text else []
    return names


def progress(stage: Stage) -> str:
    of = f" of {stage.planned_steps:,}" if stage.planned_steps not in (None, stage.steps) else ""
    return f"{stage.steps:,}{of}"


def stage_table(stages: Sequence[Stage]) -> str:
    head = ["stage", "learns by", "from", "steps", "CE held out", "KL held out", "time", "tokens/s", "wait"]
    rows = [
        [
            stage.name,
            teaching(stage),
            ", ".join(data_names(stage)),
            progress(stage) + ("" if stage.is_finished else ", not finished"),
            _change(stage, "ce"),
            _change(stage, "kl"),
            duration(stage.elapsed_s),
            spoken(share_of_time(stage, "tokens_per_s"), "rate"),
            spoken(share_of_time(stage, "wait"), "share"),
        ]
        for stage in stages
    ]
    return table(head, rows, classes="stages")


def _change(stage: Stage, name: str) -> str:
    _, values = stage.held(name)
    ends = [values[0], values[-1]] if len(values) > 1 else values
    return " → ".join(spoken(value, "nats") for value in ends) or "–"


def measures_table(looks: Sequence[Look]) -> str:
    """Every evaluation's means side by side."""
    columns: list[tuple[str, Means]] = [(look.name, look.evaluation.means) for look in looks if look.evaluation]
    if not columns:
        return ""
    rows = [
        [title, *(spoken(getattr(means, name), unit) for _, means in columns)]
        for name, (title, unit) in MEASURES.items()
        if any(getattr(means, name) is not None for _, means in columns)
    ]
    rows.insert(0, ["student", *(look.evaluation.student for look in looks if look.evaluation)])
    rows.insert(1, ["rows", *(f"{look.evaluation.rows:,}" for look in looks if look.evaluation)])
    return table(["", *(name for name, _ in columns)], rows)


def numbers_tables(buckets: Buckets) -> str:
    """The curves, for those who have no script or want to copy numbers."""
    lines: list[tuple[Line, Unit]] = [(line, chart.unit) for chart in CHARTS for line in chart.lines]
    parts = []
    for number, stage in enumerate(buckets.stages):
        title = f"<h3>{escaped(stage.name)}</h3>\n" if len(buckets.stages) > 1 else ""
        trained: list[tuple[Line, Unit]] = [
            (line, unit) for line, unit in lines if not line.is_held_out and stage.has(line.name)
        ]
        if len(stage.step_S):
            parts.append(title + _trained(buckets, number, trained))
        held: dict[str, Unit] = {name: unit for name, (_, unit) in MEASURES.items() if stage.held(name)[0]}
        if held:
            parts.append(_held(stage, held))
    return "".join(parts)


def _trained(buckets: Buckets, number: int, lines: Sequence[tuple[Line, Unit]]) -> str:
    mine = np.flatnonzero(buckets.stage_B == number)
    chosen = mine[np.unique(np.linspace(0, len(mine) - 1, min(TOLD_STEPS, len(mine))).round().astype(int))]
    first_B, last_B = buckets.steps()
    middle_B = (first_B + last_B) // 2
    columns: list[tuple[Float64, Unit]] = [(buckets.curve(line.name).smooth_B, unit) for line, unit in lines]
    rows = [
        [f"{int(middle_B[bucket]):,}", *(spoken(float(smooth_B[bucket]), unit) for smooth_B, unit in columns)]
        for bucket in chosen.tolist()
    ]
    return table(["step", *(line.name for line, _ in lines)], rows)


def _held(stage: Stage, units: dict[str, Unit]) -> str:
    steps = list(stage.looks)
    places = np.unique(np.linspace(0, len(steps) - 1, min(TOLD_LOOKS, len(steps))).round().astype(int))
    rows = [
        [f"{step:,}", *(spoken(stage.looks[step].get(name, math.nan), unit) for name, unit in units.items())]
        for step in (steps[place] for place in places.tolist())
    ]
    return table(["held out, after step", *units], rows)


def exact_match_part(found: ExactMatch) -> str:
    error = "" if found.standard_error is None else f" ± {100 * found.standard_error:.1f}"
    facts = [f"{found.right:,} of {found.checkable:,} answers", f"{found.rows:,} rows"]
    facts += [f"{name.replace('_', ' ')} {spoken(value, 'rate')}" for name, value in found.others().items() if value]
    parts = [
        f"<h3>Exact match: {100 * found.share:.1f}{error} %</h3>\n",
        f'<p class="facts">{escaped(" · ".join(facts))}</p>\n',
    ]
    wrong = [each for each in found.examples if not each.is_right]
    right = [each for each in found.examples if each.is_right]
    for title, examples in (("Wrong answers", wrong), ("Right answers", right)):
        if examples:
            items = "".join(map(_example, examples))
            parts.append(f"<details><summary>{title}: {len(examples)} examples</summary>\n{items}</details>\n")
    return "".join(parts)


def _example(example: Example) -> str:
    got = "no answer" if example.got is None else example.got
    reply = "" if example.reply in (None, example.got) else f"<dt>reply</dt><dd>{escaped(example.reply or '')}</dd>"
    way = "right" if example.is_right else "wrong"
    return (
        f'<article class="example"><h4>{escaped(example.sample_id)}</h4>\n<dl><dt>prompt</dt>'
        f"<dd>{escaped(example.prompt)}</dd><dt>expected</dt><dd>{escaped(example.expected)}</dd>"
        f'<dt>got</dt><dd class="{way}">{escaped(got)}</dd>{reply}</dl></article>\n'
    )


def tasks_table(tasks: dict[str, Task]) -> str:
    rows = []
    for name, task in tasks.items():
        for metric, score in task.metrics.items():
            shots = "–" if task.num_fewshot is None else str(task.num_fewshot)
            documents = "–" if task.documents is None else f"{task.documents:,}"
            rows.append([name, metric, spoken(score.value, "nats"), spoken(score.stderr, "nats"), shots, documents])
    return "<h3>lm-eval</h3>\n" + table(
        ["task", "metric", "value", "standard error", "few-shot", "documents"], rows, classes="tasks"
    )


def settings_part(stage: Stage) -> str:
    """What is not as it is by default first, then all."""
    rows = [[name, _plain(value), _plain(usual)] for name, value, usual in differing(stage.settings)]
    return (
        f"<h3>{escaped(stage.name)}</h3>\n"
        + table(["setting", "value", "by default"], rows, classes="settings")
        + f"<details><summary>All settings</summary>\n<pre>{escaped(settings_yaml(stage.settings))}</pre></details>\n"
    )


REQUIRED = object()


def differing(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings that are not as they are by default, by their dotted names, with that default; REQUIRED has none."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        usual = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, Settings):
            inside = list(differing(value, f"{prefix}{name}."))
            yield from inside
            if inside or usual is not None:
                continue
        if value != usual:
            yield f"{prefix}{name}", value, usual


def _plain(value: Any) -> str:
    """As YAML has it, on one line."""
    if value is REQUIRED:
        return "–"
    tree = _tree(value)
    return yaml.safe_dump(tree, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()


def _tree(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, list | tuple):
        return [_tree(each) for each in value]
    return value
