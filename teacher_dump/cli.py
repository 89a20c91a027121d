"""The command `teacher-dump`."""

from shared.cli import command_group, config_options, emit, json_option, read_config, run_command
from teacher_dump.config import DumpSettings


@command_group("teacher-dump", "Phase 1: keep a teacher's log-probabilities over supervised tokens as a dataset.")
def cli() -> None:
    pass


@cli.command("run")
@config_options
@json_option
def run_verb(config: str, overrides: tuple[str, ...], print_config: bool, as_json: bool) -> None:
    """Dump and seal the dataset that CONFIG describes; run again to go on after an interruption."""
    settings = read_config(DumpSettings, config, overrides, print_config=print_config)
    from teacher_dump.dump import run_dump  # torch takes seconds to import; --help need not wait for it

    info = run_dump(settings).info()
    sealed = f"{settings.output}: sealed; {info['rows']:,} rows, {info['positions']:,} positions"
    size = f"{info['kept_per_position']:.1f} ids and {info['bytes_per_position']:.1f} bytes per position"
    emit(info, [f"{sealed}, {size}", f"  next: logit-shards info {settings.output}"], as_json=as_json)


def main() -> None:
    run_command(cli)
