"""The plan: what a dump will hold and how it is cut into units, settled once before the first unit and never changed.

Whoever goes on with a dump, on whatever machine, goes by the plan that is there; with other contents it is refused.
"""

from typing import Any

from shared.config import Settings
from shared.errors import ConfigError, MismatchError
from shared.fingerprint import sha256_of_json
from shared.manifest import CREATED_BY, FORMAT_VERSION, Event, Input, Manifest, Shard, Teacher, row_format
from shared.schema import RowFormat
from shared.text_config import TextSettings

PLAN_VERSION = 1
ENGINE = "teacher.engine"
DIGESTS = ("teacher.weights_sha256", "teacher.revision")
READ_WITH = "input.settings."
MAX_UNITS = 250_000
"""Of which each may be a shard in the manifest; see `shared.manifest.MAX_MANIFEST_VALUES`."""


class Contents(Settings):
    """All that decides what the dataset will hold.  Becomes the head of the manifest."""

    teacher: Teacher
    vocab_size: int
    tokenizer_fingerprint: str
    chat_template_sha256: str | None
    keep: dict[str, Any]
    temperatures: list[float]
    input: Input
    """Without its tally, which follows from all this."""

    def require_same(self, earlier: dict[str, Any], where: str) -> None:
        """Refuse to go on with a dump, or to take as done one, that holds something else.

        Raises:
            MismatchError: names every setting that changed.
        """
        now = _flat(self.model_dump(mode="json"))
        then = _flat({key: earlier.get(key) for key in type(self).model_fields})
        now, then = ({key: each[key] for key in each if not key.startswith("input.tally")} for each in (now, then))
        for key in now.keys() - then.keys():
            if key.startswith(READ_WITH):  # an earlier release did not have this setting
                then[key] = _default(TextSettings.model_fields.get(key.removeprefix(READ_WITH)), now[key])
        if _name_of(then.get(ENGINE)) == _name_of(now[ENGINE]):
            then[ENGINE] = now[ENGINE]  # another version is no other engine
        if any(now[digest] and now[digest] == then.get(digest) for digest in DIGESTS):
            then["teacher.name"] = now["teacher.name"]  # a path, maybe, which is another one on another machine
        changed = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
        if changed:
            differences = "\n".join(f"  {key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise MismatchError(
                f"{where} belongs to another dump\n{differences}",
                next_step="give this dump another `output`, or undo the change",
            )

    def require_same_as(self, manifest: Manifest, where: str) -> None:
        """The same for a sealed dataset; raises MismatchError."""
        inputs = [each.model_dump(mode="json") for each in manifest.inputs]
        self.require_same(
            manifest.model_dump(mode="json") | {"input": inputs[0] if len(inputs) == 1 else inputs}, where
        )


class Plan(Settings):
    """Written once, before the first unit."""

    plan_version: int = PLAN_VERSION
    created_by: str = CREATED_BY
    contents: Contents
    tally: dict[str, int]
    """What becomes of the records."""
    unit_digests: list[str]
    """Of every unit's rows, ids and marks, so that what is scored is what was planned, whatever changed since."""
    longest_row: int
    largest_id: int
    unit_records: int
    files: dict[str, str]
    """The tokenizer's files, kept beside the plan, and their sha256."""

    @property
    def num_units(self) -> int:
        return -(-self.tally["records"] // self.unit_records)

    @property
    def identity(self) -> str:
        """Same plans, wherever and by whom they were made, have the same; every unit's record names it."""
        same = self.model_dump(mode="json", include={"contents", "tally", "unit_records", "unit_digests"})
        del same["contents"]["teacher"]["name"]  # a path, maybe
        return sha256_of_json(same)

    @property
    def row_format(self) -> RowFormat:
        contents = self.contents
        return row_format(contents.keep, contents.temperatures, contents.vocab_size)

    def require_same(self, contents: Contents, unit_records: int, where: str) -> None:
        """Raises MismatchError unless this is a plan for these contents."""
        contents.require_same(self.contents.model_dump(mode="json"), where)
        if self.unit_records != unit_records:
            raise MismatchError(
                f"{where} was made with unit_records {self.unit_records}, now {unit_records}",
                next_step="keep unit_records until the dump is sealed",
            )

    def require_few_units(self) -> None:
        """Raises ConfigError where the manifest could not name them all."""
        if self.num_units > MAX_UNITS:
            raise ConfigError(
                f"unit_records {self.unit_records} makes {self.num_units:,} units, at most {MAX_UNITS:,} are allowed",
                next_step=f"set unit_records to {-(-self.tally['records'] // MAX_UNITS)} or more",
            )

    def manifest(
        self, shards: list[Shard], *, unscorable: int, files: dict[str, str], history: list[Event]
    ) -> Manifest:
        contents = self.contents
        tally = self.tally | {"unscorable": unscorable}
        return Manifest(
            format_version=FORMAT_VERSION,
            **contents.model_dump(exclude={"input"}),
            inputs=[contents.input.model_copy(update={"tally": tally})],
            unit_records=self.unit_records,
            shards=shards,
            missing=[],
            history=history,
            files=files,
        )


def _default(field: Any, value: Any) -> Any:
    return value if field is None else field.get_default(call_default_factory=True)


def _name_of(engine: str | None) -> str:
    return (engine or "transformers").split()[0]  # early dumps do not name it


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, branch in tree.items():
        flat |= _flat(branch, f"{prefix}.{name}" if prefix else name)
    return flat
