"""The command `teacher-dump`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from shared.cli import command_group, config_options, emit, json_option, overrides_option, read_config, run_command
from shared.config import Settings, check_settings, load_settings
from teacher_dump.config import DumpSettings, TeacherSettings

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
def init_verb(
    model: str, files: tuple[str, ...], tokenizer: str | None, engine: str | None, output: str, config: Path
) -> None:
    """Write a commented CONFIG (dump.yaml) for a teacher and some text."""
    from teacher_dump.init import write_config

    lines = write_config(config, model=model, files=list(files), output=output, engine=engine, tokenizer=tokenizer)
    click.echo("\n".join(lines))


@cli.command("doctor")
@click.argument("config", type=click.Path(), required=False)
@overrides_option
@json_option
def doctor_verb(config: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check this machine, and with CONFIG whether its dump can run here; say what to mend."""
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
    """Score a sample and say what the dump of CONFIG will take: tokens, positions, bytes, time, memory."""
    settings = read_config(DumpSettings, config, overrides, print_config=print_config)
    from teacher_dump.estimate import describe, estimate

    found = estimate(settings, sample=records)
    emit(asdict(found), [*describe(found), f"  next: teacher-dump run {config}"], as_json=as_json)


@cli.command("run")
@config_options
@json_option
def run_verb(config: str, overrides: tuple[str, ...], print_config: bool, as_json: bool) -> None:
    """Dump and seal the dataset that CONFIG describes; run again to go on after an interruption."""
    settings = read_config(DumpSettings, config, overrides, print_config=print_config)
    from teacher_dump.dump import run_dump

    info = run_dump(settings).info()
    sealed = f"{settings.output}: sealed; {info['rows']:,} rows, {info['positions']:,} positions"
    size = f"{info['kept_per_position']:.1f} ids and {info['bytes_per_position']:.1f} bytes per position"
    emit(info, [f"{sealed}, {size}", f"  next: logit-shards info {settings.output}"], as_json=as_json)


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
    """Score rows of DATASET again with the live teacher, twice, and compare.

    --set teacher.model=… names the teacher where it lies elsewhere now.
    """
    from shared.dataset import LogitDataset
    from teacher_dump.rescore import describe, require_agreement, rescore, teacher_of

    opened = LogitDataset.open(dataset)
    rescored = rescore(opened, _live_teacher(teacher_of(opened), config, overrides), num_rows=rows, seed=seed)
    emit(asdict(rescored), describe(rescored), as_json=as_json)
    require_agreement(rescored, dataset)


class OnlyTeacher(Settings):
    teacher: TeacherSettings


def _live_teacher(known: dict[str, Any], config: str | None, overrides: tuple[str, ...]) -> TeacherSettings:
    if config is not None:
        return load_settings(DumpSettings, config, overrides).teacher
    return check_settings(OnlyTeacher, {"teacher": known}, overrides, name="the dataset's teacher").teacher


def main() -> None:
    run_command(cli)
