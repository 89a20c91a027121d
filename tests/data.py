"""Input files and configs for tests of whole runs."""

import json
from pathlib import Path
from typing import Any

from shared.dataset import LogitDataset
from teacher_dump.config import DumpSettings
from teacher_dump.dump import run_dump
from teacher_dump.ledger import Ledger, UnitRecord

TOPICS = ["a red fox", "two plus three", "the blue bird", "ten stories", "a fox and five birds", "what is once"]


def chat_records(num_records: int) -> list[dict[str, Any]]:
    """Chats of one to three rounds with answers of very unlike lengths."""
    records = []
    for n in range(num_records):
        turns = [{"role": "system", "content": "Tell stories."}] if n % 3 == 0 else []
        for turn in range(1 + n % 3):
            turns.append({"role": "user", "content": f"Question {n}.{turn}: {TOPICS[(n + turn) % len(TOPICS)]}?"})
            turns.append({"role": "assistant", "content": f"{TOPICS[n % len(TOPICS)]} " * (1 + (n * 5 + turn) % 9)})
        records.append({"id": f"chat-{n}", "messages": turns})
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def dump_settings(teacher: Path, files: Path, output: Path, **changes: Any) -> DumpSettings:
    """A small dump whose units, batches and chunks are all cut several times."""
    tree: dict[str, Any] = {
        "teacher": {
            "model": str(teacher),
            "dtype": "float32",
            "device": "cpu",
            "batch_tokens": 300,
            "chunk_positions": 37,
        },
        "data": {"files": [str(files)]},
        "output": str(output),
        "keep": {"k": 8, "max_kl": 0},
        "temperatures": [1, 2],
        "unit_records": 7,
    }
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return DumpSettings.model_validate(tree)


def sealed_dump(settings: DumpSettings, **options: Any) -> LogitDataset:
    """Dump everything."""
    assert run_dump(settings, **options) is not None, "units are left to do"
    return LogitDataset.open(settings.output)


def done_units(ledger: Ledger) -> dict[int, UnitRecord]:
    """The records of the plan that is there."""
    plan = ledger.plan()
    assert plan is not None
    return ledger.records(plan)
