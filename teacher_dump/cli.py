"""The command `teacher-dump`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from shared.cli import (
    command_group,
    config_options,
    emit,
    json_option,
    overrides_option,
    read_config,
    run_command,
    stop_after,
    stop_after_option,
)
from shared.config import CONFIG_SUFFIXES, Settings, check_settings, load_settings
from shared.dataset import read_info
from shared.errors import LogitferryError
from shared.folders import open_folder
from shared.workers import Share
from teacher_dump.config import DumpSettings, TeacherSettings
from teacher_dump.ledger import Ledger

# Modules that need torch, which takes seconds to import, are imported by the verbs: --help need not wait for it.


@command_group("teacher-dump", "Phase 1: keep a teacher's log-probabilities over supervised tokens as a dataset.")
def cli() -> None:
    pass


@cli.command("init")
@click.option("--model", required=True, help="The teacher: a folder, or a name on the Hugging Face Hub.")
@click.option("--data", "files", required=True, multiple=True, help="A text file, folder or URL; repeatable.")
@click.option("--tokenizer", help="Where it is not the teacher's own.")
@click.option("--engine", type=click.Choice(["transformers", "vllm"]), help="By default what this machine has.")
@click.option("--output", default="my-dump", show_default=True, help="Folder of the dataset.")
@click.argument("config", type=click.Path(path_type=Path), default=Path("dump.yaml"))
@json_option
def init_verb(
    model: str,
    files: tuple[str, ...],
    tokenizer: str | None,
    engine: str | None,
    output: str,
    config: Path,
    as_json: bool,
) -> None:
    """Write a commented CONFIG for a teacher and some text."""
    from teacher_dump.init import write_config

    lines = write_config(config, model=model, files=list(files), output=output, engine=engine, tokenizer=tokenizer)
    settings = load_settings(DumpSettings, config).model_dump(mode="json") if as_json else {}
    emit({"config": str(config), "settings": settings}, lines, as_json=as_json)


@cli.command("doctor")
@click.argument("config", type=click.Path(), required=False)
@overrides_option
@json_option
def doctor_verb(config: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check this machine, and with CONFIG whether its dump can run.  Says what to mend."""
    settings = load_settings(DumpSettings, config, overrides) if config else None
    from teacher_dump.doctor.examination import examine, exit_code, render

    findings = examine(settings)
    emit({"findings": [asdict(finding) for finding in findings]}, render(findings), as_json=as_json)
    raise click.exceptions.Exit(exit_code(findings))


@cli.command("estimate")
@config_options
@click.option("--records", default=256, show_default=True, help="Size of the sample.", type=click.IntRange(min=1))
@json_option
def estimate_verb(config: str, overrides: tuple[str, ...], print_config: bool, records: int, as_json: bool) -> None:
    """Say what the dump of CONFIG will take, from a sample.  Tokens, positions, bytes, time, memory."""
    settings = read_config(DumpSettings, config, overrides, print_config=print_config)
    from teacher_dump.estimate import describe, estimate

    found = estimate(settings, sample=records)
    emit(asdict(found), [*describe(found), f"  next: teacher-dump run {config}"], as_json=as_json)


@cli.command("run")
@config_options
@click.option(
    "--worker", help="i/n: do the i-th of n shares of the units, from 0.  By default what torchrun or srun says."
)
@click.option(
    "--launcher",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="ray: replicas of the teacher as actors of a Ray cluster.",
)
@stop_after_option
@click.option(
    "--plan-only", is_flag=True, help="Read and check the input, write the plan, and stop; needs no accelerator."
)
@json_option
def run_verb(
    config: str,
    overrides: tuple[str, ...],
    print_config: bool,
    worker: str | None,
    launcher: Literal["here", "ray"],
    stop_after_s: float | None,
    plan_only: bool,
    as_json: bool,
) -> None:
    """Dump and seal the dataset that CONFIG describes.

    Run again to go on after an interruption.  Several workers may run at once, with --worker or under torchrun or
    srun; whoever finishes last seals.
    """
    settings = read_config(DumpSettings, config, overrides, print_config=print_config)
    share = None if worker is None else Share.parse(worker)
    stop_after(stop_after_s)
    from teacher_dump.dump import run_dump

    sealed = run_dump(settings, share=share, launcher=launcher, plan_only=plan_only)
    if sealed is None:
        _emit_status(settings.output, as_json=as_json)
    else:
        _emit_sealed(settings.output, as_json=as_json)


@cli.command("status")
@click.argument("output")
@json_option
def status_verb(output: str, as_json: bool) -> None:
    """Say how far the dump in OUTPUT is.  Units done, pace, time left, who, and what failed.

    OUTPUT is the dataset's folder or URL, or the config of the dump.  Reads what is committed, and that alone.
    """
    _emit_status(_output_of(output), as_json=as_json)


@cli.command("seal")
@click.argument("output")
@json_option
def seal_verb(output: str, as_json: bool) -> None:
    """Seal the dump in OUTPUT, where all units are done.  The last worker does it by itself, unless it was stopped.

    OUTPUT is the dataset's folder or URL, or the config of the dump.
    """
    from teacher_dump.seal import seal

    folder = _output_of(output)
    if seal(Ledger(open_folder(folder))) is not None:
        _emit_sealed(folder, as_json=as_json)
        return
    _emit_status(folder, as_json=as_json)
    raise LogitferryError(
        f"{folder}: there are units left to do", next_step="run the same `teacher-dump run` again, it goes on"
    )


def _output_of(place: str) -> str:
    return load_settings(DumpSettings, place).output if place.endswith(CONFIG_SUFFIXES) else place


def _emit_status(output: str, *, as_json: bool) -> None:
    from teacher_dump.status import describe, status

    found = status(Ledger(open_folder(output)))
    emit(
        {**asdict(found), "failed": [each.model_dump() for each in found.failed]},
        describe(found, output),
        as_json=as_json,
    )


def _emit_sealed(output: str, *, as_json: bool) -> None:
    info = read_info(output)
    sealed = f"{output}: sealed; {info['rows']:,} rows, {info['positions']:,} positions"
    size = f"{info['kept_per_position']:.1f} ids and {info['bytes_per_position']:.1f} bytes per position"
    emit({"sealed": True, **info}, [f"{sealed}, {size}", f"  next: logit-shards info {output}"], as_json=as_json)


@cli.command("rescore")
@click.argument("dataset", type=click.Path())
@click.option("--rows", default=64, show_default=True, help="Rows to draw.", type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--config", type=click.Path(), help="A config whose `teacher` to use; by default the manifest's.")
@overrides_option
@json_option
def rescore_verb(
    dataset: str, rows: int, seed: int, config: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Score rows of DATASET again, and compare.  By the live teacher, twice.

    --set teacher.model=… names the teacher where it lies elsewhere now.
    """
    from shared.dataset import LogitDataset
    from teacher_dump.rescore import describe, require_agreement, rescore, teacher_of

    opened = LogitDataset.open(dataset)
    rescored = rescore(opened, _live_teacher(teacher_of(opened), config, overrides), num_rows=rows, seed=seed)
    emit(asdict(rescored), describe(rescored), as_json=as_json)
    require_agreement(rescored, dataset)
    if not as_json:
        click.echo(f"{dataset}: what is stored is what this teacher says; rounding explains the differences")


class OnlyTeacher(Settings):
    teacher: TeacherSettings


def _live_teacher(known: dict[str, Any], config: str | None, overrides: tuple[str, ...]) -> TeacherSettings:
    if config is not None:
        return load_settings(DumpSettings, config, overrides).teacher
    return check_settings(OnlyTeacher, {"teacher": known}, overrides, name="the dataset's teacher").teacher


def main() -> None:
    run_command(cli)
