"""The command `student-train`."""

from shared.cli import command_group, config_options, emit, json_option, read_config, run_command
from student_train.config import TrainSettings


@command_group("student-train", "Phase 2: train a student on a logit dataset, or on text alone.")
def cli() -> None:
    pass


@cli.command("run")
@config_options
@json_option
def run_verb(config: str, overrides: tuple[str, ...], print_config: bool, as_json: bool) -> None:
    """Train the student that CONFIG describes and leave a Hugging Face model."""
    settings = read_config(TrainSettings, config, overrides, print_config=print_config)
    from student_train.train import Trainer, finished_run  # torch takes seconds to import; --help need not wait

    result = finished_run(settings) or Trainer(settings).run()
    lines = [f"{result['model']}: {result['steps']} steps in {result['seconds']:.0f} s"]
    if held_out := result["held_out"]:
        kl = "" if held_out["kl"] is None else f", KL to the teacher {held_out['kl']:.4f}"
        lines.append(f"  held out: cross-entropy {held_out['ce']:.4f}{kl} nats per supervised token")
    emit(result, lines, as_json=as_json)


def main() -> None:
    run_command(cli)
