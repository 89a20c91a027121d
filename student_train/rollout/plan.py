"""The plan of a rollout: who writes, how, and what is asked; settled before the first reply and never changed."""

from typing import Any

from shared.config import Settings
from shared.errors import MismatchError
from shared.fingerprint import sha256_of_json
from shared.manifest import CREATED_BY, Teacher
from student_train.lineage import writer_name
from student_train.rollout.config import RolloutSettings

PLAN_VERSION = 1
MEANS = {"student", "data", "output", "vllm", "verify", "batch_rows", "device"}
"""Settings that change no reply, or that other parts of the plan stand for."""


class Contents(Settings):
    """All that decides what is written, as far as it is known without reading every row."""

    settings: dict[str, Any]
    student: dict[str, Any]
    tokenizer: dict[str, Any]
    """Fingerprint and chat template."""
    data: list[dict[str, Any]]

    def require_same(self, earlier: "Contents", where: str) -> None:
        """Raises MismatchError, which names every setting that changed."""
        then, now = _flat(earlier.model_dump(mode="json")), _flat(self.model_dump(mode="json"))
        changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        if changed:
            differences = "\n".join(f"  {name}: was {then.get(name)!r}, is {now.get(name)!r}" for name in changed)
            raise MismatchError(
                f"{where} belongs to another rollout\n{differences}",
                next_step="give this rollout another `output`, or undo the change",
            )


class Plan(Settings):
    """Written once, before the first unit."""

    plan_version: int = PLAN_VERSION
    created_by: str = CREATED_BY
    model: str
    """What the config called the student."""
    writer: str
    """What sample ids and sources call its weights."""
    contents: Contents
    prompts: str
    """Digest of all prompts, references and stops, so that what is asked is what was planned."""
    num_prompts: int
    tally: dict[str, int]
    """What became of the rows."""

    @property
    def unit_prompts(self) -> int:
        return self.contents.settings["unit_prompts"]

    @property
    def samples(self) -> int:
        return self.contents.settings["samples"]

    @property
    def num_units(self) -> int:
        return -(-self.num_prompts // self.unit_prompts)

    @property
    def identity(self) -> str:
        """Same plans have the same; every unit's record names it."""
        return sha256_of_json(self.model_dump(mode="json", include={"contents", "prompts", "num_prompts"}))

    def require_same_prompts(self, now: "Plan", where: str) -> None:
        """Raises MismatchError where other prompts are read today."""
        if (self.prompts, self.num_prompts) != (now.prompts, now.num_prompts):
            raise MismatchError(
                f"{where} asks {self.num_prompts} prompts of digest {self.prompts}, but {now.num_prompts} of digest "
                f"{now.prompts} are read now",
                next_step="put back the data, or what makes prompts of them; or give another `output`",
            )


def contents_of(
    settings: RolloutSettings,
    student: Teacher,
    tokenizer: dict[str, Any],
    data: list[dict[str, Any]],
    verifier: dict[str, Any] | None,
    context_tokens: int | None,
) -> Contents:
    """Of a rollout with these settings."""
    digests = {"config_sha256": student.config_sha256, "weights_sha256": student.weights_sha256}
    known = {"name": student.name, "revision": student.revision} if student.weights_sha256 is None else digests
    return Contents(
        settings=settings.model_dump(mode="json", exclude=MEANS)
        | {"verify": verifier, "engine_settings": settings.vllm.of_values()},
        student={**known, "dtype": student.dtype, "context_tokens": context_tokens},
        tokenizer=tokenizer,
        data=data,
    )


def writer_of(student: Teacher) -> str:
    """Twelve hexadecimal digits that tell its weights from others."""
    return writer_name(student.model_dump())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list):
        tree = {str(number): each for number, each in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, branch in tree.items():
        flat |= _flat(branch, f"{prefix}.{name}" if prefix else name)
    return flat
