"""What the guides say exists: their links, files, commands with their options, settings, and targets of make."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import click
import pytest
import yaml
from pydantic import BaseModel

from shared.logit_shards import cli as logit_shards
from student_train.cli import cli as student_train
from student_train.config import TrainSettings
from student_train.eval.config import EvalSettings
from student_train.recipe import StageSettings
from student_train.rollout.config import RolloutSettings
from student_train.score.config import ScoreSettings
from teacher_dump.cli import cli as teacher_dump
from teacher_dump.config import DumpSettings

ROOT = Path(__file__).parents[1]
OURS = ("shared", "teacher_dump", "student_train", "tests", "examples")
GUIDES = [*ROOT.glob("*.md"), *(p for name in OURS for p in (ROOT / name).rglob("*.md") if "golden" not in p.parts)]
COMMANDS = {"logit-shards": logit_shards, "teacher-dump": teacher_dump, "student-train": student_train}
CONFIGS = (DumpSettings, TrainSettings, EvalSettings, RolloutSettings, ScoreSettings, StageSettings)
OF_THE_MANIFEST = "keep.tail"


def named(guides: list[Path]) -> Any:
    return pytest.mark.parametrize("guide", guides, ids=[str(guide.relative_to(ROOT)) for guide in guides])


def commands_in(text: str) -> Iterator[list[str]]:
    """Words of every command of ours that stands on lines of its own, also behind torchrun, or between backticks."""
    lines = re.findall(
        r"^(?: {4}|)(?:torchrun .*-m )?((?:teacher|logit|student)[-_]\w+ .*)$", text.replace("\\\n", " "), re.M
    )
    spans = re.findall(r"`((?:teacher-dump|logit-shards|student-train) [^`]+)`", " ".join(text.split()))
    for command in (*lines, *spans):
        words = shlex.split(command, comments=True)
        if words[1].strip("…") and words[0].replace("_", "-") in COMMANDS:
            yield [words[0].replace("_", "-"), *words[1:]]


def settings_in(text: str) -> Iterator[Any]:
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S):
        yield yaml.safe_load(block)


def models_of(kind: Any) -> list[type[BaseModel]] | None:
    """What may stand below a setting of that type; None for anything."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    if get_origin(kind) is dict:
        return models_of(get_args(kind)[1]) or None
    if get_origin(kind) in (Annotated, list, tuple, Union, UnionType):
        below = [models_of(each) for each in get_args(kind) if not isinstance(each, str)]
        return None if None in below else [model for models in below for model in models or ()]
    return None if kind is Any else []


def knows(model: type[BaseModel], tree: dict[str, Any]) -> bool:
    """Is every key of the tree a setting of the model?"""
    for key, value in tree.items():
        if (found := model.model_fields.get(key)) is None:
            return False
        if key == "manner" and isinstance(value, dict) and "take" not in value:
            value = {"take": value}  # its short form
        values = value.values() if get_origin(found.annotation) is dict and isinstance(value, dict) else [value]
        if not all(fits(models_of(found.annotation), each) for each in values):
            return False
    return True


def fits(models: list[type[BaseModel]] | None, value: Any) -> bool:
    if isinstance(value, list):
        return all(fits(models, each) for each in value)
    return models is None or not isinstance(value, dict) or any(knows(model, value) for model in models)


def is_known(tree: dict[str, Any]) -> bool:
    stages = tree.get("stages") or {}
    rest = {key: value for key, value in tree.items() if key != "stages"}
    return all(any(knows(config, each) for config in CONFIGS) for each in (rest, *stages.values()))


def along(path: str) -> Any:
    tree: Any = None
    for name in reversed(path.split(".")):
        tree = {name: tree}
    return tree


@named(GUIDES)
def test_links_and_files_that_a_guide_names_are_there(guide: Path):
    text = guide.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in filter(None, links):
        assert (guide.parent / link).exists(), link
    for path in re.findall(rf"`((?:{'|'.join(OURS)})/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


@named(GUIDES)
def test_commands_of_a_guide_are_taken_as_they_stand(guide: Path):
    for name, verb, *words in commands_in(guide.read_text(encoding="utf-8")):
        command = COMMANDS[name].commands.get(verb)
        assert command is not None, f"{name} {verb}"
        if words:
            with suppress(click.MissingParameter):  # `train.yaml --set a.b=c` is often said without the file
                command.make_context(verb, list(words))
        for override in (b for a, b in pairwise(words) if a == "--set"):
            assert is_known(along(override.split("=")[0])), override


@named(GUIDES)
def test_settings_of_a_guide_are_known(guide: Path):
    text = guide.read_text(encoding="utf-8")
    for tree in settings_in(text):
        assert is_known(tree), tree
    tops = {key for config in CONFIGS for key in config.model_fields}
    for path in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:: [^`]*)?`", text):
        if (
            path != OF_THE_MANIFEST
            and path.split(".")[0] in tops
            and not re.search(r"\.(py|md|yaml|json|jsonl|parquet)$", path)
        ):
            assert is_known(along(path)), path


def test_targets_of_make_that_guides_name_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for guide in GUIDES:
        said = re.findall(r"(?:`|^ {4})make ([a-z][\w-]+)", guide.read_text(encoding="utf-8"), re.M)
        assert set(said) <= targets, (guide, set(said) - targets)


def test_what_is_not_there_is_seen():
    assert not is_known({"teacher": {"modle": "x"}})
    assert not is_known({"data": {"mix": [{"datset": "x"}]}})
    assert not is_known(along("loss.tial"))
    assert not is_known({"student": {"model": "x"}, "stages": {"one": {"knid": "sft"}}})
    assert list(
        commands_in("    logit-shards info my-dump   # what\nand `teacher-dump run\ndump.yaml --stop-after 1h`")
    ) == [
        ["logit-shards", "info", "my-dump"],
        ["teacher-dump", "run", "dump.yaml", "--stop-after", "1h"],
    ]
