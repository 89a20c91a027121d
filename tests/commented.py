"""What tests ask of a config file that documents every setting."""

import re
from typing import Any

from pydantic import BaseModel


def uncommented(text: str) -> str:
    """As an editor makes it of every commented setting."""
    return re.sub(r"^( *)# ", r"\1", text, flags=re.MULTILINE)


def keys(tree: Any) -> Any:
    return {name: keys(value) for name, value in tree.items()} if isinstance(tree, dict) else None


def described(kind: type[BaseModel]) -> list[str]:
    """The docstrings of all settings, also of those that lie in others."""
    texts = []
    for each in kind.model_fields.values():
        texts += [each.description] if each.description else []
        if isinstance(each.annotation, type) and issubclass(each.annotation, BaseModel):
            texts += described(each.annotation)
    return texts
