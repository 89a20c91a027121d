"""Units side by side: what a run waits for, what an error leaves behind, and when the teacher is loaded at all."""

import re
from pathlib import Path
from typing import Any

import pytest

from shared import folders
from shared.dataset import LogitDataset
from tests.data import dump_settings, sealed_dump


def test_a_finished_dump_does_not_load_the_teacher_again(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    def refused(*_arguments: Any, **_more: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    settings = dump_settings(teacher_folder, chats, sealed.folder)
    assert sealed_dump(settings, load=refused).identity() == sealed.identity()
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out"), load=refused)


def test_an_error_while_writing_reaches_the_caller_and_what_was_written_stays(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Writing goes on in a thread of its own."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    write = folders.write_atomically

    def full(path: Path, data: Any, **options: Any) -> None:
        if path.name == "part-00002.parquet":
            raise OSError(28, "No space left on device")
        write(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_atomically", full)
        with pytest.raises(OSError, match="No space left on device"):
            sealed_dump(settings)
    assert sorted(path.name for path in (tmp_path / "out/data").iterdir())[:2] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert not (tmp_path / "out/manifest.json").exists()
    assert sealed_dump(settings).manifest.shards == sealed.manifest.shards


def test_a_run_says_what_it_waited_for(
    teacher_folder: Path, chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out"))
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("waited for")]
    shares = [int(share) for share in re.findall(r"(\d+) %", told)]
    assert re.sub(r"\d+", "N", told) == "waited for text N %, the teacher N %, writing N %"
    assert 95 <= sum(shares) <= 102
