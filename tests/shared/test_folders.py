"""One contract for folders of this machine and folders at URLs."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from shared.errors import ConfigError, OutputError
from shared.folders import Folder, LocalFolder, RemoteFolder, open_folder

OURS = ("manifest.json", ".work")


@pytest.fixture(params=["path", "file_url", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    url = {"path": str(tmp_path / "out"), "file_url": (tmp_path / "out").as_uri(), "memory": f"memory:/{tmp_path}/out"}
    return open_folder(url[request.param])


def test_what_is_written_is_read(folder: Folder):
    folder.claim(OURS)
    folder.write("a.bin", b"old")
    folder.write("a.bin", memoryview(b"new"))
    folder.write("data/deep/b.bin", b"")
    assert folder.read("a.bin") == b"new"
    assert folder.read_all(["data/deep/b.bin", "a.bin"]) == [b"", b"new"]
    assert folder.read_all([]) == []
    assert folder.files() == ["a.bin", "data/deep/b.bin"]
    assert folder.files("data") == ["data/deep/b.bin"]
    assert folder.exists("a.bin")
    assert folder.sha256("a.bin") == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


def test_what_is_not_there(folder: Folder):
    assert folder.files() == folder.files("data") == []
    assert not folder.exists("a.bin")
    assert folder.sha256("a.bin") is None
    for read in (lambda: folder.read("a.bin"), lambda: folder.read_all(["a.bin", "b.bin"])):
        with pytest.raises(FileNotFoundError):
            read()
    folder.remove("a.bin")
    folder.remove("data")


def test_files_and_folders_are_removed(folder: Folder):
    for path in ("work/a", "work/deep/b", "workshop/c", "d"):
        folder.write(path, b"x")
    folder.remove("work")
    assert folder.files() == ["d", "workshop/c"]
    folder.remove("d")
    assert folder.files() == ["workshop/c"]


def test_a_folder_is_claimed_where_it_is_new_or_ours(folder: Folder):
    folder.claim(OURS)
    assert folder.files() == [], "what was tried is gone"
    folder.write(".work/plan", b"x")
    folder.claim(OURS)
    assert folder.files() == [".work/plan"]


def test_what_a_killed_claim_left_does_not_make_it_somebody_elses(tmp_path: Path):
    folder = open_folder(f"memory:/{tmp_path}/out")
    folder.write(".probe-0123", b"")
    folder.claim(OURS)
    assert folder.files() == []


def test_a_folder_of_somebody_else_is_refused(folder: Folder):
    folder.write("thesis.tex", b"x")
    with pytest.raises(ConfigError, match=r"out is not empty and holds none of manifest.json, .work: it is not ours"):
        folder.claim(OURS)


def test_what_one_writes_another_sees_at_once(tmp_path: Path):
    """File systems keep listings; other workers write as well."""
    one, two = (open_folder(f"memory:/{tmp_path}/shared") for _ in range(2))
    one.write("units/0", b"x")
    assert two.files("units") == ["units/0"]
    one.write("units/1", b"x")
    assert two.files("units") == ["units/0", "units/1"]
    two.remove("units/0")
    assert one.files("units") == ["units/1"]


def test_leftovers_of_killed_writers_are_swept_by_name_and_age(tmp_path: Path):
    folder = LocalFolder(tmp_path)
    for name, age_s in ((".writing-part-1.x", 0), (".writing-plan.x", 0), (".writing-plan.y", 100), ("plan", 100)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    folder.sweep("part-*", older_than_s=0)
    folder.sweep("*", older_than_s=60)
    assert folder.files() == [".writing-plan.x", "plan"]


def test_temporary_files_never_lie_among_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = LocalFolder(tmp_path / "out")
    seen: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    folder.write("data/part.parquet", b"x")
    (temporary,) = [path for path in seen if ".writing-" in path]
    assert Path(temporary).parent == tmp_path / "out"


@pytest.mark.parametrize(
    ("url", "said"),
    [("s4://bucket/out", "Protocol not known: s4"), ("memory://run[1]", r"memory://run\[1\]: has one of \*\?\[ in it")],
)
def test_urls_that_cannot_be_used_are_refused(url: str, said: str):
    with pytest.raises(ConfigError, match=said):
        open_folder(url)


def test_errors_of_a_file_system_say_where(monkeypatch: pytest.MonkeyPatch):
    class Broken(MemoryFileSystem):
        def pipe_file(self, *_arguments: object, **_options: object) -> None:
            raise RuntimeError("the door is shut")

        cat_file = find = exists = open = pipe_file

    folder = RemoteFolder(Broken(), "/out", "broken://out/")
    attempts: list[Callable[[], object]] = [
        lambda: folder.write("a", b"x"),
        lambda: folder.read("a"),
        lambda: folder.files("a"),
        lambda: folder.exists("a"),
        lambda: folder.sha256("a"),
    ]
    for attempt in attempts:
        with pytest.raises(OutputError, match=r"broken://out/a cannot be reached: the door is shut"):
            attempt()


def test_errors_that_are_given_back_are_raised(tmp_path: Path):
    """As earlier releases of fsspec do it when several files are read at once."""

    class GivesBack(MemoryFileSystem):
        def cat_ranges(self, *_arguments: object, **_options: object) -> list[object]:
            return [b"one", ConnectionError("503")]

    with pytest.raises(OutputError, match="out cannot be reached: 503"):
        RemoteFolder(GivesBack(), "/out", "broken://out").read_all(["a", "b"])


def test_folders_are_made_where_a_file_system_has_them(tmp_path: Path):
    """As sftp does."""
    folder = RemoteFolder(LocalFileSystem(auto_mkdir=False), str(tmp_path / "deep/out"), "sftp://host/deep/out")
    folder.claim(OURS)
    folder.write("data/a", b"x")
    assert folder.files() == ["data/a"]
    folder.remove("data")
    assert folder.files() == []


@pytest.mark.parametrize("name", [".probe-x1", ".writing-part.y", ".doctor-z", ".nfs0001"])
def test_what_others_try_or_left_does_not_make_a_folder_theirs(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    LocalFolder(tmp_path).claim(OURS)


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file, not a folder"):
        LocalFolder(tmp_path / "file").read(".work/plan")
