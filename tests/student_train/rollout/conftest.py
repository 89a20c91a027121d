"""The student that knows some answers by heart, and what it is asked; a rollout as a config has it."""

from pathlib import Path
from typing import Any

import pytest

from student_train.rollout.config import RolloutSettings
from tests.student_train.eval.conftest import asked, learnt_folder

__all__ = ["asked", "learnt_folder"]

ANSWER = r"####\s*(\S+)"


@pytest.fixture
def tree(student_folder: Path, asked: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a student that knows nothing: twelve replies in four units, of which some end."""
    return {
        "student": {"model": str(student_folder)},
        "data": {"text": {"files": [str(asked)]}},
        "output": str(tmp_path / "out"),
        "samples": 2,
        "max_new_tokens": 12,
        "unit_prompts": 2,
        "batch_rows": 3,
        "device": "cpu",
    }


@pytest.fixture
def settings(tree: dict[str, Any]) -> Any:
    """The same, with changes."""
    return lambda **changes: RolloutSettings.model_validate(tree | changes)
