"""The command `student-train`."""

import os

from shared.cli import (
    command_group,
    config_options,
    emit,
    json_option,
    read_config,
    run_command,
    stop_after,
    stop_after_option,
)
from student_train.config import TrainSettings


@command_group("student-train", "Phase 2: train a student on a logit dataset, or on text alone.")
def cli() -> None:
    pass


@cli.command("run")
@config_options
@stop_after_option
@json_option
def run_verb(
    config: str, overrides: tuple[str, ...], print_config: bool, stop_after_s: float | None, as_json: bool
) -> None:
    """Train the student that CONFIG describes and leave a Hugging Face model.

    Interrupted, it leaves a checkpoint and goes on from there when it is run again.  Several processes train together
    under `torchrun --nproc-per-node N -m student_train run CONFIG`.
    """
    settings = read_config(TrainSettings, config, overrides, print_config=print_config)
    stop_after(stop_after_s)
    from student_train.train import finished_run, train  # torch takes seconds to import; --help need not wait

    result = finished_run(settings) or train(settings)
    if os.environ.get("RANK", "0") != "0":
        return
    lines = [f"{result['model']}: {result['steps']} steps in {result['seconds']:.0f} s"]
    if held_out := result["held_out"]:
        kl = "" if held_out["kl"] is None else f", KL to the teacher {held_out['kl']:.4f}"
        lines.append(f"  held out: cross-entropy {held_out['ce']:.4f}{kl} nats per supervised token")
    lines.append(f"  {100 * result['wait']:.1f} % of the time was spent waiting for data")
    emit(result, lines, as_json=as_json)


def main() -> None:
    run_command(cli)
