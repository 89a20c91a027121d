"""A small dump, and the chats that it is of."""

from pathlib import Path

import pytest

from shared.dataset import LogitDataset
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(23))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, chats: Path) -> LogitDataset:
    return sealed_dump(dump_settings(teacher_folder, chats, tmp_path_factory.mktemp("dump") / "out"))
