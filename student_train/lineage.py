"""Where a student's weights come from, and so how stale rollouts are.

A run leaves `lineage.json` beside the weights: which weights it began with, which those began with, and so on, each
with the number of optimizer steps up to then.  A rollout says in its row's `source` which weights wrote it, so a later
run can tell how many steps lie between the writer and the student that learns from it, as long as the one has come of
the other.

    {"version": 1, "weights": [{"weights": "3f2a…", "steps": 0}, {"weights": "b81c…", "steps": 1200}]}
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DamagedDataError
from shared.fingerprint import sha256_of_json
from shared.pretrained import weights_digest

LINEAGE_NAME = "lineage.json"
VERSION = 1
DIGITS = 12
WRITER = re.compile(rf"student-([0-9a-f]{{{DIGITS}}})/")


def writer_name(model: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits for the weights of a student, by its `identity()["model"]`: of their digest, of a
    commit of the Hub, or else of the name and revision that it goes by."""
    name = str(model.get("weights_sha256") or model.get("revision") or "")[:DIGITS]
    is_digest = len(name) == DIGITS and set(name) <= set("0123456789abcdef")
    return name if is_digest else sha256_of_json([model.get("name"), model.get("revision")])[:DIGITS]


def source_of(writer: str, source: str) -> str:
    """The source of a rollout to a prompt that comes from `source`."""
    return f"student-{writer}/{source}"


def writer_of(source: str) -> str | None:
    """Which weights wrote a row; None where it is no rollout."""
    match = WRITER.match(source)
    return match[1] if match else None


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Of the weights that a run begins with."""

    steps_of: dict[str, int]
    """Steps up to each of the weights that it has come of, its own last."""

    @staticmethod
    def of(folder: str, model: Mapping[str, Any]) -> "Lineage":
        """Of a model by its `identity()["model"]`; one that says nothing of it has no ancestors.

        Raises:
            DamagedDataError: what it says cannot be read.
        """
        path, own = Path(folder) / LINEAGE_NAME, writer_name(model)
        if not path.is_file():
            return Lineage(steps_of={own: 0})
        known = Lineage.read(path)
        # Weights that were changed by other hands since have no ancestors.
        return Lineage(steps_of=known if own in known else {own: 0})

    @staticmethod
    def read(path: Path) -> dict[str, int]:
        """What a lineage.json says: weights and the steps up to them, the oldest first.

        Raises:
            DamagedDataError: it cannot be read.
        """
        try:
            tree = json.loads(path.read_bytes())
            return {str(each["weights"])[:DIGITS]: int(each["steps"]) for each in tree["weights"]}
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedDataError(f"{path} holds no lineage: {error}", next_step=f"remove {path}") from None

    @property
    def steps(self) -> int:
        """Up to where the run begins."""
        return max(self.steps_of.values())

    def leave(self, folder: Path, steps: int) -> None:
        """Beside the weights that lie in the folder now, after so many steps of the run."""
        known = self.steps_of | {weights_digest(folder)[:DIGITS]: self.steps + steps}
        tree = {"version": VERSION, "weights": [{"weights": name, "steps": at} for name, at in known.items()]}
        (folder / LINEAGE_NAME).write_text(json.dumps(tree, indent=1), encoding="utf-8")

    def staleness(self, sources: Sequence[str], step: int) -> dict[str, float]:
        """For the log of the run's step, which is counted from 0: the share of rows that are rollouts, and the steps
        since these were written, where that is known, on average."""
        writers = [writer for source in sources if (writer := writer_of(source)) is not None]
        if not writers:
            return {}
        ages = [self.steps + step - self.steps_of[writer] for writer in writers if writer in self.steps_of]
        share = {"rollouts": len(writers) / len(sources)}
        return share | ({"stale_steps": sum(ages) / len(ages)} if ages else {})
