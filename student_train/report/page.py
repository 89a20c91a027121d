"""The report as one page, see `shared.page`: what it says can be read without a script, which lets it be pointed at."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared import page
from shared.amounts import duration
from shared.errors import ConfigError
from shared.files import write_atomically
from shared.page import escaped
from student_train.report.axes import spoken
from student_train.report.charts import drawn_charts
from student_train.report.checks import FEWEST_STEPS, LOOKED_AT, findings, share_of_time
from student_train.report.diagrams import diagrams
from student_train.report.evals import Look, read_look, require_whole
from student_train.report.read import HELD_OUT_NAME, LOG_NAME, Stage, read_stage
from student_train.report.samples import Samples, legend
from student_train.report.series import Buckets
from student_train.report.tables import (
    data_names,
    exact_match_part,
    measures_table,
    numbers_tables,
    progress,
    settings_part,
    stage_table,
    tasks_table,
    teaching,
)

PAGE_NAME = "report.html"
PAGE_BEGIN = b"<!DOCTYPE html>"
STYLE = page.STYLE + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = page.SCRIPT + Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def write_report(runs: Sequence[Path], evals: Sequence[Path], output: Path | None) -> dict[str, Any]:
    """Read the runs, in order, and the evaluations, and write the page; by default into the last run's folder.

    Returns where it lies, how large it is, and what was found, for programs.

    Raises:
        ConfigError: a folder holds no run, is named twice, or there is something else where the page should lie.
        DamagedDataError: a file of a run or an evaluation is not what was written.
        OutputError: the page cannot be written.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice", next_step="name each run once, the first stage first")
    output = output or runs[-1] / PAGE_NAME
    stages = [read_stage(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    _require_free(output)
    for stage in stages:
        if stage.held_out is not None:
            require_whole(stage.held_out, stage.folder / HELD_OUT_NAME)
    content = report_page(stages, [read_look(path) for path in evals]).encode("utf-8", "replace")
    write_atomically(output, content)
    return {
        "report": str(output),
        "bytes": len(content),
        "runs": [_summary(stage) for stage in stages],
        "findings": [asdict(finding) for finding in findings(stages)],
    }


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names; with those above them where two have the same."""
    paths = [run.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _require_free(output: Path) -> None:
    """A page from before is written over, and nothing else is."""
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder", next_step=f"--output {output / PAGE_NAME}")
    if output.is_file():
        with output.open("rb") as file:
            if file.read(len(PAGE_BEGIN)) not in (PAGE_BEGIN, b""):
                raise ConfigError(
                    f"--output {output} is there and is no page: it is not written over",
                    next_step="give another --output",
                )


def _summary(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "folder": str(stage.folder),
        "steps": stage.steps,
        "planned_steps": stage.planned_steps,
        "finished": stage.is_finished,
        "seconds": stage.elapsed_s,
        "tokens_per_s": _known(share_of_time(stage, "tokens_per_s")),
        "wait": _known(share_of_time(stage, "wait")),
        "held_out": {name: _known(value) for name, value in stage.newest_look.items()} or None,
    }


def _known(value: float) -> float | None:
    return None if value != value else value  # NaN, which JSON has no word for


def report_page(stages: Sequence[Stage], evals: Sequence[Look]) -> str:
    """The page about runs in a row and evaluations beside them."""
    buckets = Buckets.of(stages)
    charts, chart_data = drawn_charts(buckets)
    own = [Look(name=stage.name, evaluation=stage.held_out) for stage in stages if stage.held_out]
    detailed = [*own[-1:], *evals]
    samples = Samples.of(detailed)
    parts = [
        _header(stages),
        _findings(stages),
        stage_table(stages) if len(stages) > 1 else "",
        _curves(charts, buckets),
        _evaluations(own, evals),
        _worst_rows(detailed, samples),
        '<section id="settings">\n<h2>Settings</h2>\n' + "".join(map(settings_part, stages)) + "</section>",
    ]
    first_B, last_B = buckets.steps()
    data = {
        "stages": [stage.name for stage in stages],
        "offsets": buckets.offsets,
        "total": buckets.total,
        "stage": buckets.stage_B.tolist(),
        "first": first_B.tolist(),
        "last": last_B.tolist(),
        "charts": chart_data,
        **samples.data(),
    }
    body = "\n".join(part for part in parts if part)
    return page.html_document(title=_title(stages), body=body, data=data, style=STYLE, script=SCRIPT)


def _title(stages: Sequence[Stage]) -> str:
    return " → ".join(stage.name for stage in stages)


def _header(stages: Sequence[Stage]) -> str:
    last = stages[-1]
    sources = ", ".join(dict.fromkeys(name for stage in stages for name in data_names(stage)))
    way = teaching(last) if len(stages) == 1 else f"{len(stages)} stages"
    students = _students(stages)
    sentence = f"{', '.join(students)} learn{'s' * (len(students) == 1)} from {sources} ({way})"
    tiles = "".join(
        f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}</dd></div>"
        for label, value in _tiles(stages)
        if value != "–"
    )
    return (
        f'<header>\n<h1>{escaped(_title(stages))}</h1>\n<p class="summary">{escaped(sentence)}</p>\n'
        f'{_state(stages)}<dl class="tiles">{tiles}</dl>\n</header>'
    )


def _students(stages: Sequence[Stage]) -> list[str]:
    """What the stages begin with, but for what a stage before has made."""
    begun: dict[str, None] = {}
    for number, stage in enumerate(stages):
        made = {
            Path(path, "model").resolve() for each in stages[:number] for path in (each.folder, each.settings.output)
        }
        if Path(stage.settings.student.model).resolve() not in made:
            begun[stage.settings.student.model] = None
    return list(begun)


def _tiles(stages: Sequence[Stage]) -> list[tuple[str, str]]:
    last = stages[-1]
    newest = last.newest_look
    return [
        ("steps" if len(stages) == 1 else f"steps of {last.name}", progress(last)),
        ("held-out cross-entropy", spoken(newest.get("ce"), "nats")),
        ("held-out KL", spoken(newest.get("kl"), "nats")),
        ("agreement", spoken(newest.get("agreement"), "share")),
        ("accuracy", spoken(newest.get("accuracy"), "share")),
        ("time", duration(sum(stage.elapsed_s for stage in stages))),
        ("tokens per second", spoken(share_of_time(last, "tokens_per_s"), "rate")),
        ("waiting for data", spoken(share_of_time(last, "wait"), "share")),
    ]


def _state(stages: Sequence[Stage]) -> str:
    """Of what is not finished: since when nothing was logged, and how long it may take."""
    notes = []
    for stage in stages:
        if stage.is_finished:
            continue
        if not len(stage.step_S):
            said = "no step is logged yet"
        else:
            written = datetime.fromtimestamp((stage.folder / LOG_NAME).stat().st_mtime, UTC)
            said = f"step {progress(stage)}, logged {written:%Y-%m-%d %H:%M} UTC"
            if stage.planned_steps and stage.steps:
                left_s = stage.elapsed_s / stage.steps * (stage.planned_steps - stage.steps)
                said += f"; about {duration(left_s)} are left" if left_s > 0 else ""
        cut = " The last line of its log is a part of one." if stage.is_cut else ""
        notes.append(f'<p class="note">{escaped(stage.name)} is not finished: {escaped(said)}.{cut}</p>\n')
    return "".join(notes)


def _findings(stages: Sequence[Stage]) -> str:
    found = findings(stages)
    looked = f"<details><summary>What is looked at</summary>\n<p>{escaped(', '.join(LOOKED_AT))}.</p></details>\n"
    if not any(len(stage.step_S) for stage in stages):
        return ""
    if not found:
        is_short = all(len(stage.step_S) < FEWEST_STEPS for stage in stages)
        said = f" so far; trends are looked for from {FEWEST_STEPS} steps on" if is_short else ""
        return f'<section class="findings calm">\n<p>Nothing calls for attention{said}.</p>\n{looked}</section>'
    several = len(stages) > 1
    items = "".join(
        f"<li>{f'<b>{escaped(each.stage)}</b> ' if several else ''}<strong>{escaped(each.seen)}</strong> "
        f"{escaped(each.means)}</li>\n"
        for each in found
    )
    return f'<section class="findings">\n<h2>Worth a look</h2>\n<ul>{items}</ul>\n{looked}</section>'


def _curves(charts: str, buckets: Buckets) -> str:
    if not charts:
        return '<section id="curves">\n<h2>Curves</h2>\n<p>Nothing is logged yet.</p>\n</section>'
    note = "Faint: what was logged" + ("" if buckets.are_steps else ", least and greatest of neighbouring steps")
    note += ". Strong: the mean over 2 % of the stage. Ticks below: looks at held-out rows"
    note += ". Red: a step went wrong" if any(stage.bad_S.any() for stage in buckets.stages) else ""
    note += ". Dashed: the next stage, which counts its own steps." if len(buckets.stages) > 1 else "."
    return (
        f'<section id="curves">\n<h2>Curves</h2>\n<p class="facts">{note}</p>\n<div class="charts">\n{charts}\n</div>\n'
        f"<details><summary>The curves as numbers</summary>\n{numbers_tables(buckets)}</details>\n</section>"
    )


def _evaluations(own: Sequence[Look], evals: Sequence[Look]) -> str:
    parts = [measures_table([*own, *evals])]
    for look in [*own[-1:], *evals]:
        inside = diagrams(look.evaluation) if look.evaluation else ""
        inside += exact_match_part(look.exact_match) if look.exact_match else ""
        inside += tasks_table(look.lm_eval) if look.lm_eval else ""
        title = f"<h3>{escaped(look.name)}</h3>\n" if len(evals) + len(own[-1:]) > 1 else ""
        parts.append(title + inside if inside else "")
    inside = "".join(parts)
    return f'<section id="evaluations">\n<h2>Evaluation</h2>\n{inside}</section>' if inside else ""


def _worst_rows(looks: Sequence[Look], samples: Samples) -> str:
    shown = [look for look in looks if look.evaluation and look.evaluation.worst]
    if not shown:
        return ""
    several = len(shown) > 1
    rows = "\n".join((f"<h3>{escaped(look.name)}</h3>\n" if several else "") + samples.section(look) for look in shown)
    has_teacher = any(row.kl_P is not None for look in shown if look.evaluation for row in look.evaluation.worst)
    return (
        f'<section id="worst">\n<h2>Worst rows</h2>\n{legend(has_teacher=has_teacher)}<div class="columns rows">\n'
        f'<div>\n{rows}\n</div>\n<aside id="panel" aria-live="polite" hidden></aside>\n</div>\n</section>'
    )
