"""A file is wholly there or not there, whatever happens while it is written."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import ConfigError, OutputError
from shared.files import (
    HASH_BLOCK_BYTES,
    TEMPORARY_PREFIX,
    alone_in,
    nearest_folder,
    sha256_of_file,
    write_atomically,
    written_atomically,
)

DIES_BEFORE_RENAME = """
import os, signal, sys
from pathlib import Path
from shared.files import write_atomically

Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"new" * 1000)
"""


def test_write_atomically_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "folders" / "a.bin"
    write_atomically(path, b"old and longer")
    write_atomically(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl_c"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomically_leaves_the_old_file_and_nothing_else_where_it_fails(tmp_path, monkeypatch, step, error):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_two_processes_are_not_in_one_output_folder_at_once(tmp_path):
    told = pytest.raises(ConfigError, match="another process is writing to it")
    with alone_in(tmp_path), told, alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        assert os.listdir(tmp_path) == []


def test_write_atomically_makes_the_bytes_durable_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace
    kind = lambda descriptor: "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(f"fsync {kind(fd)}"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (steps.append("rename"), replace(self, to)))
    write_atomically(tmp_path / "a.bin", b"x")
    assert steps == ["fsync file", "rename", "fsync folder"]


def test_write_atomically_keeps_the_old_content_where_the_process_is_killed_before_the_rename(tmp_path):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    killed = subprocess.run([sys.executable, "-c", DIES_BEFORE_RENAME, str(path)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = set(os.listdir(tmp_path)) - {"a.bin"}
    assert left.startswith(TEMPORARY_PREFIX), "what is left behind bears no name that anything reads"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("size", [0, 1, HASH_BLOCK_BYTES, 2 * HASH_BLOCK_BYTES + 7])
def test_sha256_of_file_is_that_of_its_bytes_at_any_size(tmp_path, size):
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()


@pytest.mark.parametrize("write", [write_atomically, lambda path, _: written_atomically(path).__enter__()])
def test_a_disk_that_may_only_be_read_is_told(write, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OutputError, match=r"a\.bin cannot be written: Read-only file system\n  next: "):
        write(tmp_path / "a.bin", b"new")


def test_a_folder_that_nobody_may_look_into_has_no_near_names(tmp_path, monkeypatch):
    (tmp_path / "dumps").mkdir()
    assert str(nearest_folder(tmp_path / "dump")).endswith("dumps?")

    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    assert nearest_folder(tmp_path / "dump") is None
