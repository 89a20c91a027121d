"""Everything that all cells of a seed share: corpus, models, teachers, and what the teachers say.

Every command is one that you would run yourself; those that have been run are not run again, and one that was stopped
goes on.
"""

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import models
import task
import yaml

from shared.dataset import LogitDataset
from student_train.cli import cli as student_train
from teacher_dump.cli import cli as teacher_dump

HERE = Path(__file__).resolve().parent
TEACHERS = ("reasoning", "fast")
SPLITS = {"student": "", "dev": "dev-", "test": "test-"}
COMMANDS = {"teacher-dump": teacher_dump, "student-train": student_train}


@dataclass(frozen=True, kw_only=True)
class World:
    """The folder of one seed.  The teachers may be those of another seed's folder."""

    folder: Path
    seed: int
    teachers_of: Path | None = None
    is_tiny: bool = False

    def config(self, name: str) -> str:
        return str(HERE / f"{name}.yaml")

    def run(self, command: str, *arguments: str) -> None:
        """Run a command in the world's folder as a shell would, but without starting Python again."""
        program, verb = command.split()
        click.secho(f"$ {command} {shlex.join(arguments)}", fg="cyan", err=True)
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(sys.stderr):
            COMMANDS[program].main(args=[verb, *arguments], prog_name=program, standalone_mode=False)

    def write(self, path: str, tree: dict[str, Any]) -> str:
        """A config as YAML, so that a cell can be run again by hand."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return path

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` found, with the seconds that it took; found once and kept in a file."""
        path = self.folder / "found" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        begin_s = time.monotonic()
        found = work()
        found["seconds"] = round(time.monotonic() - begin_s, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        aside.rename(path)
        return found

    def make(self) -> dict[str, Any]:
        """Corpus, models, teachers and their dumps of all splits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {"corpus": self._corpus, "teachers": self._teachers, "dumps": self._dumps}
        return {name: self.once(name, work) for name, work in parts.items()}

    def _corpus(self) -> dict[str, Any]:
        sizes = task.TINY_SIZES if self.is_tiny else task.SIZES
        shapes = (models.TINY_TEACHER, models.TINY_STUDENT) if self.is_tiny else (models.TEACHER, models.STUDENT)
        task.write_corpus(self.folder / "corpus", self.seed, sizes)
        models.write_models(
            self.folder / "corpus", self.folder / "models", self.seed, *shapes, tokenizer_of=self._tokenizer_of()
        )
        return {}

    def _tokenizer_of(self) -> Path | None:
        return None if self.teachers_of is None else self.teachers_of / "models/tokenizer"

    def _teachers(self) -> dict[str, Any]:
        if self.teachers_of is not None:
            (self.folder / "teachers").unlink(missing_ok=True)
            (self.folder / "teachers").symlink_to(self.teachers_of.resolve() / "teachers")
            return {"of": str(self.teachers_of)}
        short = ["stages.reasoning.steps=30", "stages.fast.steps=30", "optimizer.warmup_steps=3"] * self.is_tiny
        self.run("student-train run", self.config("teacher"), *set_options(short))
        return {}

    def _dumps(self) -> dict[str, Any]:
        for teacher in TEACHERS:
            for split, prefix in SPLITS.items():
                self.dump(f"{prefix}{teacher}", teacher, [f"data.files=[corpus/{split}.jsonl]"])
        return {}

    def dump(self, name: str, teacher: str, changes: Sequence[str]) -> dict[str, Any]:
        """A dataset of what a teacher says; returns what `logit-shards info` does."""
        changes = [f"teacher.model=teachers/{teacher}/model", f"output=dumps/{name}", *changes]
        self.run("teacher-dump run", self.config("dump"), *set_options(changes))
        return self.info(name)

    def info(self, name: str) -> dict[str, Any]:
        return LogitDataset.open(self.folder / "dumps" / name).info()

    def mean_tokens(self, dataset: str, manner: str | None) -> float:
        """Of a dataset's rows."""
        opened = LogitDataset.open(self.folder / "dumps" / dataset)
        rows = [row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)]
        lengths = [row.num_tokens for row in rows if manner is None or asked_in(row.sample_id) == manner]
        return sum(lengths) / len(lengths)


def asked_in(sample_id: str) -> str:
    """The manner, which the corpus's ids end with."""
    return sample_id.split("~")[0].rpartition("-")[2]


def set_options(changes: Sequence[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]
