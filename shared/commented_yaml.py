"""A config file that documents every setting: those that are given as they are, all others commented out.

`## ` begins what a setting's own docstring says of it, `# ` a setting with its default.  Who takes the `# ` away, of
one setting or of all, has a config that loads.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from shared.config import Settings
from shared.errors import ConfigError, OutputError
from shared.files import write_atomically

TEXT_COLUMNS = 100
HEAD = """\
## What `{command}` reads.  A line that begins with `# ` is a setting with its default: take the `# ` away to
## change it.  Paths are relative to the folder where the command is run.

"""


def require_new(path: Path) -> None:
    """Raises ConfigError where there is a file already."""
    if path.exists():
        raise ConfigError(f"{path} exists already, and is left as it is", next_step="give another path, or remove it")


def write_config_file(path: Path, kind: type[Settings], given: dict[str, Any], *, command: str) -> None:
    """Raises OutputError: the file cannot be written."""
    try:
        write_atomically(path, (HEAD.format(command=command) + commented_yaml(kind, given)).encode())
    except OSError as error:
        reason = error.strerror or error.args[0]
        raise OutputError(f"{path} cannot be written: {reason}", next_step="give another path") from error


def commented_yaml(kind: type[Settings], given: dict[str, Any]) -> str:
    """The settings of `kind` in their order; `given` is a tree of plain values that has all that are required."""
    return "\n\n".join("\n".join(block) for block in _blocks(kind, given)) + "\n"


def _blocks(kind: type[BaseModel], given: dict[str, Any]) -> Iterator[list[str]]:
    """The lines of each setting."""
    for name, field in kind.model_fields.items():
        inner = _tree_at(field.annotation)
        text = field.description or (inner.__doc__ if inner else None) or ""
        text_lines = [f"## {line}" for line in textwrap.wrap(re.sub(r"\s*\n\s*", " ", text), TEXT_COLUMNS)]
        # An empty tree of settings has nothing to stand below its name, and is as good as none.
        is_given = bool(given.get(name)) if inner else name in given
        value = given[name] if is_given else to_jsonable_python(field.default)
        own = [f"{name}:", *_indented(_blocks(inner, value))] if inner else [f"{name}: {_flow(value)}"]
        yield text_lines + (own if is_given else [f"# {line}" for line in own])


def _indented(blocks: Iterable[list[str]]) -> list[str]:
    return [f"  {line}" for block in blocks for line in block]


def _tree_at(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _flow(value: Any) -> str:
    """On one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
