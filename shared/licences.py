"""Licences of a dataset, of the teacher and of the texts: what somebody stated, or nothing.

They stand in the YAML header of the card alone.  The manifest has no word of them, so a licence can be corrected
without making another dataset of it; what is merged, filtered, repaired or pulled in part carries on what its
parents' cards say.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

KNOWN = frozenset(
    [
        "afl-3.0",
        "agpl-3.0",
        "apache-2.0",
        "apple-amlr",
        "apple-ascl",
        "artistic-2.0",
        "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigscience-openrail-m",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "c-uda",
        "cc",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "cdla-sharing-1.0",
        "creativeml-openrail-m",
        "deepfloyd-if-license",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "gemma",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "h-research",
        "intel-research",
        "isc",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "lgpl-lr",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "lppl-1.3c",
        "mit",
        "mpl-2.0",
        "ms-pl",
        "ncsa",
        "odbl",
        "odc-by",
        "ofl-1.1",
        "openrail",
        "openrail++",
        "osl-3.0",
        "pddl",
        "postgresql",
        "unknown",
        "unlicense",
        "wtfpl",
        "zlib",
    ]
)
"""Identifiers that the Hub knows; it refuses a card with another one, which is `other` with a name there."""
OURS = "logitferry"
"""Key of the header for what the Hub has none for."""
NOT_STATED = "not stated"
HEADER = re.compile(r"\s*^---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
"""Between two lines of their own; a licence may have `---` in its name."""


@dataclass(frozen=True, kw_only=True)
class Licences:
    """Names of licences as somebody stated them, in order, each once; none where nobody did."""

    dataset: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def header(self) -> dict[str, Any]:
        """What the header of a card says of them."""
        known = [name.lower() for name in self.dataset if name.lower() in KNOWN]
        others = [name for name in self.dataset if name.lower() not in KNOWN]
        tree: dict[str, Any] = {}
        if self.dataset:
            ids = [*known, *(["other"] if others else [])]
            tree["license"] = ids[0] if len(ids) == 1 else ids
        if others:
            tree["license_name"] = ", ".join(others)
        ours = {f.name: list(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name)}
        return tree | ({OURS: {"licences": ours}} if ours else {})


def licences_in(card: str) -> Licences:
    """What the header of a card says; nothing where it has none, or one that cannot be read."""
    tree = header_of(card)
    ours = tree.get(OURS)
    stated = ours.get("licences") if isinstance(ours, dict) else None
    stated = dict(stated) if isinstance(stated, dict) else {}
    found = Licences(**{f.name: _names(stated.get(f.name)) for f in fields(Licences)})
    expected = found.header()
    if any(tree.get(key) != expected.get(key) for key in ("license", "license_name")):  # edited there, as on the Hub
        plain = tuple(name for name in _names(tree.get("license")) if name != "other")
        found = replace(found, dataset=plain + _names(tree.get("license_name")))
    return found


def joined(all_of: Sequence[Licences]) -> Licences:
    """Those of several datasets that become one: every licence of each of them applies.

    Where one of them states none, nobody can say what applies to the whole, and none is stated.
    """
    names = {f.name: [getattr(each, f.name) for each in all_of] for f in fields(Licences)}
    return Licences(
        **{name: tuple(dict.fromkeys(sum(lists, ()))) if all(lists) else () for name, lists in names.items()}
    )


def _names(tree: Any) -> tuple[str, ...]:
    names = tree if isinstance(tree, list) else [tree]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def header_of(card: str) -> dict[str, Any]:
    """The YAML header of a card as a mapping; an empty one where there is none."""
    found = HEADER.match(card.replace("\r\n", "\n"))
    if found is None:
        return {}
    try:
        tree = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}
