"""The plan: all that decides what a dump will hold.  Running again with another plan is refused, not mixed in."""

import json
from pathlib import Path
from typing import Any

from shared.config import Settings
from shared.errors import DamagedDataError, MismatchError
from shared.files import write_atomically
from shared.manifest import FORMAT_VERSION, Event, Input, Manifest, Shard, Teacher, row_format
from shared.schema import RowFormat

PLAN_NAME = "plan.json"
ENGINE = "teacher.engine"


class Plan(Settings):
    """Written once before the first unit.  Its fields become the head of the manifest."""

    teacher: Teacher
    vocab_size: int
    tokenizer_fingerprint: str
    chat_template_sha256: str | None
    keep: dict[str, Any]
    temperatures: list[float]
    input: Input
    unit_records: int

    @property
    def num_units(self) -> int:
        return -(-self.input.tally["records"] // self.unit_records)

    @property
    def row_format(self) -> RowFormat:
        return row_format(self.keep, self.temperatures, self.vocab_size)

    def manifest(self, shards: list[Shard], files: dict[str, str], history: list[Event]) -> Manifest:
        return Manifest(
            format_version=FORMAT_VERSION,
            **self.model_dump(exclude={"input"}),
            inputs=[self.input],
            shards=shards,
            missing=[],
            history=history,
            files=files,
        )

    def require_same_as_manifest(self, manifest: Manifest, where: Path) -> None:
        """The same for a sealed dataset; raises MismatchError."""
        inputs = [each.model_dump(mode="json") for each in manifest.inputs]
        self.require_same(
            manifest.model_dump(mode="json") | {"input": inputs[0] if len(inputs) == 1 else inputs}, where
        )

    def require_same(self, earlier: dict[str, Any], where: Path) -> None:
        """Refuse to go on with a dump, or to take as done one, that was planned otherwise.

        Raises:
            MismatchError: names every setting that changed.
        """
        now = _flat(self.model_dump(mode="json", exclude={"unit_records"}))
        then = _flat({key: earlier.get(key) for key in type(self).model_fields if key != "unit_records"})
        if _name_of(then.get(ENGINE)) == _name_of(now[ENGINE]):
            then[ENGINE] = now[ENGINE]  # another version is no other engine
        changed = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
        if changed:
            differences = "\n".join(f"  {key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise MismatchError(
                f"{where} belongs to another dump\n{differences}",
                next_step="give this dump another `output`, or undo the change",
            )


def commit_plan(plan: Plan, work: Path) -> None:
    """Write the plan, or check that the one that is there is the same."""
    path = work / PLAN_NAME
    if not path.is_file():
        write_atomically(path, json.dumps(plan.model_dump(mode="json"), indent=1).encode())
        return
    try:
        earlier = Plan.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise DamagedDataError(f"{path}: is no plan: {error}", next_step=f"remove {work} to begin again") from None
    plan.require_same(earlier.model_dump(mode="json"), path)
    if earlier.unit_records != plan.unit_records:
        raise MismatchError(
            f"{path}: was planned with unit_records {earlier.unit_records}, now {plan.unit_records}",
            next_step="keep unit_records until the dump is sealed",
        )


def _name_of(engine: str | None) -> str:
    return (engine or "transformers").split()[0]  # early dumps do not name it


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, branch in tree.items():
        flat |= _flat(branch, f"{prefix}.{name}" if prefix else name)
    return flat
