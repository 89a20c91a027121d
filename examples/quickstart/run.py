"""The whole path on one machine: train a teacher, dump it, train two students from one start, compare them.

    python examples/quickstart/run.py [--output DIR] [--seed N] [--slips SHARE] [--tiny] [--tune]

Every phase is one of the commands that you would run yourself, and is printed as it is run.  The two students
differ in one thing: SFT learns from the labels alone and reads the text, SFT + KD also learns from what the teacher
said and reads the dataset.  `--tune` trains both arms at every learning rate of one grid and keeps for each the one
with the lower cross-entropy on the development split; what is reported is the test split, in either case.
"""

import contextlib
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import measure
import models
import task

from shared.cli import run_command
from shared.dataset import LogitDataset
from student_train.cli import cli as student_train
from teacher_dump.cli import cli as teacher_dump

HERE = Path(__file__).resolve().parent
COMMANDS = {"teacher-dump": teacher_dump, "student-train": student_train}
TUNING_RATES = (2e-3, 4e-3, 8e-3)
SPLITS = ("student_train", "dev", "test")
TINY = {
    "teacher": ["steps=60", "optimizer.warmup_steps=5"],
    "student": ["steps=30", "evaluate_every=10", "optimizer.warmup_steps=5"],
}


@dataclass
class Quickstart:
    """One run of the example in its own folder."""

    folder: Path
    seed: int
    tiny: bool
    slips: float
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, *, tune: bool) -> dict[str, Any]:
        """All phases; returns what the table shows."""
        with self._phase("corpus and models"):
            sizes = task.TINY_SIZES if self.tiny else task.SIZES
            task.write_corpus(self.folder / "corpus", self.seed, sizes, self.slips)
            shapes = (models.TINY_TEACHER, models.TINY_STUDENT) if self.tiny else (models.TEACHER, models.STUDENT)
            models.write_models(self.folder / "corpus", self.folder / "models", self.seed, *shapes)
        with self._phase("teacher"):
            self._command("student-train run", "teacher.yaml", f"seed={self.seed}", *self._tiny("teacher"))
        with self._phase("dump"):
            for split in SPLITS:
                files = f"data.files=[corpus/{split}.jsonl]"
                self._command("teacher-dump run", "dump.yaml", files, f"output=dumps/{split}")
        chosen = {arm: self._train_arm(arm, tune=tune) for arm in ("sft", "kd")}
        with self._phase("evaluation"):
            rows = {"teacher": "teacher/model"} | {arm: f"{output}/model" for arm, output in chosen.items()}
            table = {name: measure.measure(self.folder, model) for name, model in rows.items()}
        dumped = LogitDataset.open(self.folder / "dumps/student_train").info()
        result = {
            "seed": self.seed,
            "slips": self.slips,
            "table": table,
            "chosen": chosen,
            "bytes_per_position": dumped["bytes_per_position"],
            "kept_mass": dumped["kept_mass"],
            "positions": dumped["positions"],
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        measure.draw_curves(self.folder / "curves.png", {arm: self.folder / chosen[arm] for arm in chosen})
        return result

    def _train_arm(self, arm: str, *, tune: bool) -> str:
        """Train one arm, at the tuned learning rate or at all of the grid; the folder of the run that counts."""
        common = [f"seed={self.seed}", *self._tiny("student")]
        if arm == "sft":
            # Plain SFT needs no teacher: it reads the very text that was dumped.
            common += ["loss.kd_weight=0", "data={text: {files: [corpus/student_train.jsonl]}}"]
        runs: dict[str, float] = {}
        with self._phase(arm):
            for rate in TUNING_RATES if tune else (None,):
                output = arm if rate is None else f"{arm}-{rate:g}"
                extra = [] if rate is None else [f"optimizer.learning_rate={rate}"]
                self._command("student-train run", "student.yaml", f"output={output}", *common, *extra)
                runs[output] = json.loads((self.folder / output / "run.json").read_text())["held_out"]["ce"]
        return min(runs, key=lambda output: runs[output])

    def _tiny(self, which: str) -> list[str]:
        return TINY[which] if self.tiny else []

    def _command(self, command: str, config: str, *overrides: str) -> None:
        """Run a command as a shell would, in the run's folder, but without starting Python again."""
        program, verb = command.split()
        arguments = [verb, str(HERE / config), *(part for override in overrides for part in ("--set", override))]
        click.secho(f"$ {program} {shlex.join(arguments)}", fg="cyan")
        with contextlib.chdir(self.folder):
            COMMANDS[program].main(args=arguments, prog_name=program, standalone_mode=False)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin_s


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/quickstart"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--tiny", is_flag=True, help="Small enough for a test: the path works, the numbers mean nothing.")
@click.option("--tune", is_flag=True, help="Search the learning rate of both arms over one grid on the dev split.")
@click.option(
    "--slips",
    type=click.FloatRange(0, 1),
    default=task.SLIP_RATE,
    show_default=True,
    help="Share of training records with an error in them.",
)
def main(output: Path, seed: int, tiny: bool, tune: bool, slips: float) -> None:
    """Train a teacher, dump it, train two students, compare them."""
    if output.exists() and any(output.iterdir()):
        if not (output / "corpus").is_dir():
            raise click.UsageError(f"{output} is not empty and is no quickstart folder; give another --output")
        aside = output.with_name(f"{output.name}.{int(time.time())}.old")
        output.rename(aside)
        click.echo(f"the last run was moved to {aside}", err=True)
    output.mkdir(parents=True, exist_ok=True)
    result = Quickstart(folder=output.resolve(), seed=seed, tiny=tiny, slips=slips).run(tune=tune)
    click.echo(measure.as_text(result))
    click.echo(f"\ncurves: {output / 'curves.png'}   numbers: {output / 'result.json'}")


if __name__ == "__main__":
    run_command(main)
