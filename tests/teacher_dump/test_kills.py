"""SIGKILL at every step of a dump: of its plan, of each commit, of sealing, and of the removal of what is no longer
needed.  What is visible is whole at any time, and running again ends in the very dataset of the uninterrupted dump.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.dataset import LogitDataset
from shared.verification import verify
from shared.workers import Share
from teacher_dump.dump import run_dump
from teacher_dump.engines import open_engine
from teacher_dump.ledger import UnitRecord
from tests.data import chat_records, dump_settings, write_jsonl
from tests.killed import Steps, killed_at, traced

NUM_RECORDS, UNIT_RECORDS = 8, 3


class Dump:
    """A small dump, its uninterrupted result, and a teacher that is loaded once for all that are forked."""

    def __init__(self, teacher: Path, folder: Path) -> None:
        self._teacher, self._folder = teacher, folder
        self._files = write_jsonl(folder / "chats.jsonl", chat_records(NUM_RECORDS))
        settings = self._settings(folder / "whole")
        run_dump(settings, load=self._first_load)
        self.whole = LogitDataset.open(folder / "whole")

    def _settings(self, output: Path) -> Any:
        return dump_settings(self._teacher, self._files, output, unit_records=UNIT_RECORDS)

    @contextmanager
    def _first_load(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        self._opened = open_engine(*arguments, **options)
        self._engine = self._opened.__enter__()
        yield self._engine

    @contextmanager
    def _loaded(self, *_arguments: Any, **_options: Any) -> Iterator[Any]:
        yield self._engine

    def run(self, output: Path, share: Share | None = None) -> Any:
        return run_dump(self._settings(output), load=self._loaded, share=share)

    def steps(self, output: Path) -> list[str]:
        """All that an uninterrupted run does to the disk."""
        steps = Steps()
        with traced(steps):
            self.run(output)
        return steps.names

    def check_visible(self, output: Path) -> None:
        """What has its final name is whole, and what is committed has its shard."""
        expected = {path.name: path.read_bytes() for path in (self.whole.folder / "data").iterdir()}
        for path in (output / "data").glob("*"):
            assert path.read_bytes() == expected[path.name], path
        for path in (output / ".logitferry/units").glob("*"):
            shard = UnitRecord.model_validate_json(path.read_bytes()).shard
            assert shard is None or (output / shard.path).read_bytes() == expected[Path(shard.path).name]
        if (output / "manifest.json").exists():
            assert not verify(LogitDataset.open(output), deep=True).faults

    def check_end(self, output: Path) -> None:
        """The same bytes of everything: rows, ids, order, values, manifest."""
        assert self.run(output) is not None
        assert files_of(output) == files_of(self.whole.folder)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a dataset; what killed writers may leave has names that nothing reads."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".writing-")}


@pytest.fixture(scope="module")
def dump(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return Dump(teacher_folder, tmp_path_factory.mktemp("kills"))


def test_the_steps_are_those_that_matter(dump: Dump, tmp_path: Path):
    """A record comes after its shard is durable, the manifest after all else, and no step is missing."""
    names = dump.steps(tmp_path / "out")
    of_shard = ["write part-00001.parquet", "fsync part-00001.parquet", "rename part-00001.parquet", "fsync data"]
    of_record = ["write 00001.json", "fsync 00001.json", "rename 00001.json", "fsync units"]
    of_manifest = ["write manifest.json", "fsync manifest.json", "rename manifest.json", "fsync out"]
    reached = 0
    for step in of_shard + of_record + of_manifest:
        reached = names.index(f"after {step}", reached)
    assert "before remove plan.json" in names[reached:]
    assert not any("remove" in name for name in names[:reached])
    assert "within write part-00001.parquet" in names
    assert len(names) > 150


def test_killed_at_some_step_twice_in_a_row(dump: Dump, tmp_path: Path):
    """Every ninth step; `make test-full` takes all."""
    kill_twice(dump, tmp_path, range(1, len(dump.steps(tmp_path / "steps")) + 1, 9))


@pytest.mark.full
@pytest.mark.parametrize("first", range(9))
def test_killed_at_every_step_twice_in_a_row(dump: Dump, tmp_path: Path, first: int):
    kill_twice(dump, tmp_path, range(1 + first, len(dump.steps(tmp_path / "steps")) + 1, 9))


def kill_twice(dump: Dump, folder: Path, steps: range) -> None:
    for step in steps:
        output = folder / f"killed-{step}"
        assert killed_at(step, lambda at=output: dump.run(at)), step
        dump.check_visible(output)
        # What is left to do has fewer steps; some second runs end before theirs.
        killed_at(1 + step * 37 % 101, lambda at=output: dump.run(at))
        dump.check_visible(output)
        dump.check_end(output)


def test_killed_workers_of_three_are_finished_by_two(dump: Dump, tmp_path: Path):
    """Each at another step of its share; then another number of workers goes on."""
    for step in (23, 61, 95):
        output = tmp_path / f"out-{step}"
        for index in range(3):
            killed_at(step + 11 * index, lambda at=output, n=index: dump.run(at, Share(n, 3)))
            dump.check_visible(output)
        assert dump.run(output, Share(0, 2)) is None or (output / "manifest.json").exists()
        dump.run(output, Share(1, 2))
        dump.check_end(output)
