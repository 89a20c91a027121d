"""Units side by side: what a run waits for, what an error leaves behind, and when the teacher is loaded at all."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.dataset import LogitDataset
from shared.errors import MismatchError
from teacher_dump import units
from teacher_dump.dump import run_dump
from tests.data import dump_settings


def test_a_finished_dump_does_not_load_the_teacher_again(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    def refused(*_arguments: Any, **_more: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    settings = dump_settings(teacher_folder, chats, sealed.folder)
    assert run_dump(settings, load=refused).identity() == sealed.identity()
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        run_dump(dump_settings(teacher_folder, chats, tmp_path / "out"), load=refused)


def test_an_error_while_writing_reaches_the_caller_and_what_was_written_stays(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Writing goes on in a thread of its own."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    write = units.write_atomically

    def full(path: Path, data: Any) -> None:
        if path.name == "part-00002.parquet":
            raise OSError(28, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(units, "write_atomically", full)
        with pytest.raises(OSError, match="No space left on device"):
            run_dump(settings)
    assert sorted(path.name for path in (tmp_path / "out/data").iterdir())[:2] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert not (tmp_path / "out/manifest.json").exists()
    assert run_dump(settings).manifest.shards == sealed.manifest.shards


@pytest.mark.parametrize(("earlier", "is_same"), [("transformers 4.56.0", True), (None, True), ("vllm 0.32.0", False)])
def test_another_version_of_the_engine_is_no_other_dump_but_another_engine_is(
    earlier: str | None, is_same: bool, sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    folder = tmp_path / "out"
    shutil.copytree(sealed.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["teacher"]["engine"].startswith("transformers ")
    manifest["teacher"]["engine"] = earlier
    (folder / "manifest.json").write_text(json.dumps(manifest))
    settings = dump_settings(teacher_folder, chats, folder)
    if is_same:
        assert run_dump(settings).manifest.teacher.engine == earlier
    else:
        with pytest.raises(MismatchError, match=r"teacher\.engine: was 'vllm 0\.32\.0', is 'transformers "):
            run_dump(settings)


def test_a_run_says_what_it_waited_for(
    teacher_folder: Path, chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    run_dump(dump_settings(teacher_folder, chats, tmp_path / "out"))
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("waited for")]
    shares = [int(share) for share in re.findall(r"(\d+) %", told)]
    assert re.sub(r"\d+", "N", told) == "waited for text N %, the teacher N %, writing N %"
    assert 95 <= sum(shares) <= 102
