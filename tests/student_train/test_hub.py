"""A student trains from a private dataset on the Hub, by its URL, as from a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.dataset import LogitDataset
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.shared.hub_server import TOKEN, hub_server
from tests.student_train.test_train import log_of

pytestmark = pytest.mark.cluster

URL = "hf://datasets/org/name"


def test_a_student_trains_from_the_hub_as_from_a_folder(teacher_folder: Path, student_folder: Path, tmp_path: Path):
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(20))
    dataset: LogitDataset = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "dump"))
    with hub_server() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }  # fmt: skip

        def run(*arguments: object) -> None:
            command = [sys.executable, "-m", *map(str, arguments)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
            assert done.returncode == 0, done.stdout + done.stderr
            assert TOKEN not in done.stdout + done.stderr

        run("shared.logit_shards", "push", dataset.folder, URL)
        for name, source in (("here", str(dataset.folder)), ("there", URL)):
            tree: dict[str, Any] = {
                "student": {"model": str(student_folder)}, "data": {"dataset": source}, "output": str(tmp_path / name),
                "steps": 4, "rows_per_step": 4, "batch_tokens": 600, "device": "cpu", "held_out": {"fraction": 0.2},
            }  # fmt: skip
            (tmp_path / f"{name}.yaml").write_text(json.dumps(tree))
            run("student_train", "run", tmp_path / f"{name}.yaml")
    here, there = ([each["loss"] for each in log_of(tmp_path / name) if "loss" in each] for name in ("here", "there"))
    assert here == there
    assert len(here) == 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
