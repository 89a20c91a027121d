"""The command `student-train`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from shared.amounts import size
from shared.cli import (
    command_group,
    config_options,
    emit,
    json_option,
    overrides_option,
    print_settings,
    read_config,
    run_command,
    stop_after,
    stop_after_option,
)
from shared.config import load_settings
from shared.workers import Share
from student_train.config import TrainSettings
from student_train.eval.config import EvalSettings
from student_train.recipe import Recipe, chosen_stages, load_runs, stage_folders
from student_train.rollout.config import RolloutSettings
from student_train.score.config import ScoreSettings

stage_option = click.option(
    "--stage", "stages", multiple=True, metavar="NAME", help="Of a config with stages only this one; repeatable."
)


@command_group("student-train", "Phase 2: train a student on a logit dataset, or on text alone.")
def cli() -> None:
    pass


@cli.command("init")
@click.option("--model", required=True, help="The student: a folder, or a name on the Hugging Face Hub.")
@click.option("--dataset", help="What a teacher left: a folder or URL.")
@click.option("--data", "files", multiple=True, help="For SFT alone: a text file, folder or URL; repeatable.")
@click.option("--tokenizer", help="Where it is not the student's own.")
@click.option("--output", default="my-student", show_default=True, help="Folder of the run.")
@click.argument("config", type=click.Path(path_type=Path), default=Path("train.yaml"))
@json_option
def init_verb(
    model: str,
    dataset: str | None,
    files: tuple[str, ...],
    tokenizer: str | None,
    output: str,
    config: Path,
    as_json: bool,
) -> None:
    """Write a commented CONFIG for a student and what it learns from."""
    from student_train.init import write_config

    lines = write_config(config, model=model, dataset=dataset, files=list(files), output=output, tokenizer=tokenizer)
    settings = load_settings(TrainSettings, config).model_dump(mode="json") if as_json else {}
    emit({"config": str(config), "settings": settings}, lines, as_json=as_json)


@cli.command("doctor")
@click.argument("config", type=click.Path(), required=False)
@overrides_option
@stage_option
@json_option
def doctor_verb(config: str | None, overrides: tuple[str, ...], stages: tuple[str, ...], as_json: bool) -> None:
    """Check this machine, and with CONFIG whether it can train here.

    Says what to mend.  Of several stages one is looked at: the first, or that of --stage.
    """
    settings = next(iter(_chosen(load_runs(config, overrides), stages).values())) if config else None
    from student_train.doctor.examination import examine, exit_code, render

    findings = examine(settings)
    lines, code = render(findings), exit_code(findings)
    if config and not code:
        lines.append(f"  next: student-train estimate {config}")
    emit({"findings": [asdict(finding) for finding in findings]}, lines, as_json=as_json)
    raise click.exceptions.Exit(code)


@cli.command("estimate")
@config_options
@stage_option
@click.option("--memory", help="80GiB or so: of a device of another machine.  By default that of the one here.")
@click.option(
    "--ranks", default=1, show_default=True, type=click.IntRange(min=1), help="Processes, with a device each."
)
@json_option
def estimate_verb(
    config: str,
    overrides: tuple[str, ...],
    print_config: bool,
    stages: tuple[str, ...],
    memory: str | None,
    ranks: int,
    as_json: bool,
) -> None:
    """Say what the run of CONFIG needs, and whether it fits.  Memory, steps, operations, disk.

    Of several stages one is looked at: the first, or that of --stage.  No weights are loaded and no accelerator is
    needed.  Exit code 1 where it does not fit.
    """
    recipe = load_runs(config, overrides)
    if print_config:
        print_settings(recipe)
    settings = next(iter(_chosen(recipe, stages).values()))
    from student_train.estimate.describe import describe, next_step
    from student_train.estimate.estimation import estimate
    from student_train.estimate.place import bytes_of

    try:
        memory_bytes = None if memory is None else bytes_of(memory)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--memory") from None
    found = estimate(settings, memory_bytes=memory_bytes, num_ranks=ranks)
    then = next_step(found, config, overrides, memory)
    emit(asdict(found) | {"next": then}, describe(found, then), as_json=as_json)
    raise click.exceptions.Exit(1 if found.fits is False else 0)


@cli.command("run")
@config_options
@stage_option
@stop_after_option
@json_option
def run_verb(
    config: str,
    overrides: tuple[str, ...],
    print_config: bool,
    stages: tuple[str, ...],
    stop_after_s: float | None,
    as_json: bool,
) -> None:
    """Train the student that CONFIG describes.  Leaves a Hugging Face model.

    A config with `stages` has them trained one after the other, each from the model of the one before; with --stage
    those that are named, maybe on another machine.  Interrupted, it leaves a checkpoint and goes on from there when it
    is run again.  Several processes train together under `torchrun --nproc-per-node N -m student_train run CONFIG`.
    """
    recipe = load_runs(config, overrides)
    if print_config:
        print_settings(recipe)
    runs = _chosen(recipe, stages)
    stop_after(stop_after_s)
    from student_train.train import train  # torch takes seconds to import; --help need not wait

    is_first = os.environ.get("RANK", "0") == "0"
    if isinstance(recipe, Recipe) and is_first:
        recipe.leave_in_output()
    results = dict(zip(runs, train(list(runs.values())), strict=True))
    if not is_first:
        return
    answer = {"stages": results} if isinstance(recipe, Recipe) else next(iter(results.values()))
    emit(answer, [line for result in results.values() for line in _lines_of_run(result)], as_json=as_json)


def _chosen(config: Recipe | TrainSettings, names: tuple[str, ...]) -> dict[str, TrainSettings]:
    """The runs of a config, by the names of their stages."""
    if isinstance(config, Recipe):
        return chosen_stages(config, names)
    if names:
        raise click.BadParameter("the config has no stages", param_hint="--stage")
    return {"": config}


def _lines_of_run(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['model']}: {result['steps']} steps in {result['seconds']:.0f} s"]
    if held_out := result["held_out"]:
        kl = "" if held_out["kl"] is None else f", KL to the teacher {held_out['kl']:.4f}"
        lines.append(f"  held out: cross-entropy {held_out['ce']:.4f}{kl} nats per supervised token")
    folder = Path(result["model"]).parent
    return [
        *lines,
        f"  {100 * result['wait']:.1f} % of the time was spent waiting for data",
        f"  next: student-train report {folder}",
    ]


@cli.command("rollout")
@config_options
@click.option(
    "--worker", help="i/n: do the i-th of n shares of the units, from 0.  By default what torchrun or srun says."
)
@stop_after_option
@json_option
def rollout_verb(
    config: str,
    overrides: tuple[str, ...],
    print_config: bool,
    worker: str | None,
    stop_after_s: float | None,
    as_json: bool,
) -> None:
    """Have the student of CONFIG answer the prompts of its rows.  What it wrote is marked and filtered.

    `teacher-dump run` scores the files as ready tokens.  Run again to go on after an interruption; several workers may
    run at once, with --worker or under torchrun or srun, and whoever finishes last writes rollout.json.
    """
    settings = read_config(RolloutSettings, config, overrides, print_config=print_config)
    share = None if worker is None else Share.parse(worker)
    stop_after(stop_after_s)
    from student_train.rollout.run import describe, run_rollout

    result = run_rollout(settings, share=share)
    emit(result, describe(result, settings.output), as_json=as_json)


@cli.command("score")
@config_options
@json_option
def score_verb(config: str, overrides: tuple[str, ...], print_config: bool, as_json: bool) -> None:
    """Say how hard every row of CONFIG is for the student.  For a curriculum.

    Leaves scores.jsonl and score.json in the output folder.
    """
    settings = read_config(ScoreSettings, config, overrides, print_config=print_config)
    from student_train.score.run import describe, run_scoring

    result = run_scoring(settings)
    emit(result, describe(result), as_json=as_json)


@cli.command("eval")
@config_options
@json_option
def eval_verb(config: str, overrides: tuple[str, ...], print_config: bool, as_json: bool) -> None:
    """Measure the student that CONFIG describes.  Cross-entropy and KL on rows, exact match, tasks of lm-eval.

    Leaves eval.json in the output folder, with the worst rows and some replies in full.
    """
    settings = read_config(EvalSettings, config, overrides, print_config=print_config)
    from student_train.eval.run import EVAL_NAME, run_evaluation
    from student_train.eval.table import describe, numbers

    result = run_evaluation(settings)
    emit(numbers(result), [f"{settings.output}/{EVAL_NAME}", *describe(result)], as_json=as_json)


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--eval", "evals", multiple=True, type=click.Path(path_type=Path), help="An eval.json, or its folder; repeatable."
)
@click.option("--output", type=click.Path(path_type=Path), help="The page; report.html in the last RUN unless given.")
@json_option
def report_verb(runs: tuple[Path, ...], evals: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Make one page about a run, or about several in a row.

    RUN is a run's output folder, also of a run that is going on, or that of a recipe, for all its stages; several come
    first stage first.  The page needs no network: curves, what calls for attention, calibration, the worst rows token
    by token, and the settings.
    """
    from student_train.report.page import PAGE_NAME, write_report

    result = write_report(
        [folder for run in runs for folder in stage_folders(run)], evals, output or runs[-1] / PAGE_NAME
    )
    lines = [f"{result['report']}: {size(result['bytes'])}; open it in a browser"]
    lines += [f"  {each['stage']}: {each['seen']}" for each in result["findings"]]
    emit(result, lines, as_json=as_json)


def main() -> None:
    run_command(cli)
