"""Config at the edge: one YAML file, checked as a whole, then frozen.

Unknown keys are errors with a suggestion; all errors of a file are reported at once, each with its place.
`--set a.b=c` edits the tree before it is checked, so an override obeys the same rules as the file.
Paths in a config are relative to the folder where the command is run.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from shared.errors import ConfigError

CONFIG_SUFFIXES = (".yaml", ".yml")


class Settings(BaseModel):
    """Base of every part of a config tree: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _on_this_machine(path: str) -> str:
    if "://" in path:
        raise ValueError("is a URL, and what is written there has to be on this machine: give a folder")
    return path


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_on_this_machine)]
"""Where files are renamed and folders locked, which an object store cannot do."""

S = TypeVar("S", bound=Settings)
COMMANDS = {"teacher": "teacher-dump", "student": "student-train"}
"""By the key without which no config of theirs is one."""
INIT = "a config as `teacher-dump init` or `student-train init` writes it"


def load_settings(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML config, apply `a.b=c` overrides and check the whole tree.

    Raises:
        ConfigError: the file is missing or not YAML, an override is malformed, or keys do not check.
    """
    return check_settings(kind, read_yaml(Path(path)), overrides, name=str(path), path=Path(path))


def check_settings(
    kind: type[S], tree: dict[str, Any], overrides: Sequence[str], *, name: str, path: Path | None = None
) -> S:
    """The settings that a tree of plain values holds, after the overrides; `name` is what people call it, and `path`
    the file that it was read from.

    Raises:
        ConfigError: an override is malformed, or keys do not check.
    """
    for override in overrides:
        _apply_override(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        is_there = path is not None and path.is_file()  # and no pipe, which gives what it had once
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader) if path and is_there else None
        listed: set[tuple[int | str, ...]] = set()
        lines = [
            f"  {_place(issue['loc'])}: {_explain(kind, issue, listed)}{_line(root, issue['loc'], overrides)}"
            for issue in error.errors()
        ]
        raise ConfigError(
            f"{name}: {len(lines)} setting{'s' * (len(lines) > 1)} cannot be used\n" + "\n".join(lines),
            next_step=_other_command(kind, tree, error) or f"mend the keys above; {INIT} explains every setting",
        ) from None


def settings_yaml(settings: Settings) -> str:
    """The effective config, defaults included, as YAML that `load_settings` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML would let the last one win in silence."""

    # On the nodes of the text, not on the built mapping, which holds what `<<: *base` merged in, and may override it.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: builds no objects
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} cannot be read: {error}", next_step="save it as text in UTF-8") from None
    except OSError as error:
        others = [] if path.exists() else [p.name for p in path.parent.glob("*.y*ml")]
        near = difflib.get_close_matches(path.name, others, n=1)
        raise ConfigError(
            f"config {path} cannot be read: {error}",
            next_step=f"did you mean {path.parent / near[0]}?" if near else "check the path of the config file",
        ) from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of settings, got {type(tree).__name__}", next_step=f"look at {INIT}"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator or not all(dotted.split(".")):
        raise ConfigError(f"--set {override}: expected a.b=value", next_step="for example --set output=my-dump")
    *parents, leaf = dotted.split(".")
    for depth, parent in enumerate(parents):
        branch = tree.get(parent, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} holds a value, not settings")
        tree[parent] = tree = dict(branch)  # a copy: a YAML alias puts one mapping in two places
    tree[leaf] = _parse_yaml(value, f"--set {override}")


def _other_command(kind: type[Settings], tree: dict[str, Any], error: ValidationError) -> str | None:
    """Advice, where a config is that of another command."""
    unknown = {issue["loc"] for issue in error.errors() if issue["type"] == "extra_forbidden"}
    others = [command for key, command in COMMANDS.items() if (key,) in unknown]
    own = any(key in tree for key in COMMANDS if key in kind.model_fields)
    return f"this looks like a config of {others[0]}: give it to that command" if others and not own else None


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(the whole config)"


def _line(root: yaml.Node | None, location: Sequence[int | str], overrides: Sequence[str]) -> str:
    """Which line of the file says so, or what this is missing in; none where an override says it."""
    place = _place(tuple(location))
    if any(f"{place}.".startswith(f"{override.partition('=')[0]}.") for override in overrides):
        return ""
    node, line = root, 0
    for part in location:
        if isinstance(node, yaml.MappingNode):
            below = [entry for entry in node.value if entry[0].value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            below = [(value, value) for value in node.value[part : part + 1]]
        else:
            below = []
        if not below:
            break
        line, node = below[0][0].start_mark.line + 1, below[0][1]
    return f" (line {line})" if line else ""


def _explain(kind: type[Settings], issue: Any, listed: set[tuple[int | str, ...]]) -> str:
    """`listed` are the places whose keys were told already."""
    if issue["type"] == "extra_forbidden":
        *parents, key = issue["loc"]
        known = sorted(_fields_at(kind, parents))
        if near := difflib.get_close_matches(str(key), known, n=1):
            return f"unknown key; did you mean {near[0]}?"
        is_told = tuple(parents) in listed
        listed.add(tuple(parents))
        return "unknown key" if is_told else f"unknown key; known: {', '.join(known)}"
    if issue["type"] == "missing":
        return "is required"
    if issue["type"] in ("model_type", "model_attributes_type"):
        return f"expected settings of its own below this key, got {issue['input']!r}"
    message = issue["msg"].removeprefix("Value error, ")
    # A model-level rule gets the whole mapping as its input, which says nothing that the message doesn't.
    return message if isinstance(issue["input"], (dict, BaseModel)) else f"{message}, got {issue['input']!r}"


def _fields_at(kind: type[BaseModel], location: Sequence[int | str]) -> set[str]:
    """Names of the settings allowed at a place of the tree; empty where the place is no settings class."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        kinds = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not kinds:
            return set()
        kind = kinds[0]
    return set(kind.model_fields)
