"""Shows how a model came to be, without the paths of the machine that trained it.

Of each path only the last name is shown.
"""

import re
from collections.abc import Mapping
from typing import Any

from nanollm.bundle import PROVENANCE

Record = Mapping[str, Any]

FIELDS = frozenset(
    {"bundle", "contamination", "corpus", "data", "folder", "input", "out", "output_dir", "reference", "save_dir"}
    | {"text", "tokenizer_path", "val_input"}
)
"""Settings whose texts are paths, whatever they look like."""
PATH = re.compile(r"\s*([/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]).*|\S*[/\\]\S*", re.DOTALL)
"""Absolute, or begun from here, or with a slash in it and no space."""
WITHIN = re.compile(r"(?<![\w.:/\\])(?:~?/|[A-Za-z]:[/\\])[^\s'\"]*[/\\][^\s'\"]*")
"""An absolute path within a text."""
KINDS: Mapping[str, type] = {
    **dict.fromkeys(("parent", "config", "inputs", "metrics"), dict),
    "imports": list,
    "made_by": str,
}


def public(value: Any, *, is_path: bool = False) -> Any:
    """The same provenance, or figures, with the last name of each path only; paths may be keys, too."""
    if isinstance(value, str):
        return name_of(value, is_path=is_path)
    if isinstance(value, Mapping):
        names: dict[str, str] = {}
        for key in sorted(value):  # two folders of one name stay two, and the same two in every mapping
            name = name_of(key, is_path=is_path)
            names[key] = name if name not in names.values() else f"{name} ({len(names) + 1})"
        return {names[key]: public(each, is_path=key in FIELDS) for key, each in value.items()}
    return [public(each, is_path=is_path) for each in value] if isinstance(value, list) else value


def name_of(text: str, *, is_path: bool = False) -> str:
    """The last name of a path; any other text as it is, but for absolute paths in it."""
    if is_path or PATH.fullmatch(text):
        return re.split(r"[/\\]", text.strip().rstrip("/\\"))[-1]
    return WITHIN.sub(lambda path: name_of(path[0], is_path=True), text)


def check(provenance: Any) -> None:
    """ValueError for what is no provenance: in a folder of others it may hold anything."""
    step = provenance
    while step is not None:
        for name, kind in KINDS.items():
            if not isinstance(step.get(name, kind()), kind):
                why = f"{name} must be a {kind.__name__}; delete it, and the history is left out"
                raise ValueError(f"{PROVENANCE}: {why}")
        step = step.get("parent")


def stages(provenance: Record) -> list[Record]:
    """What was done to the model, the first first."""
    found: list[Record] = []
    step: Record | None = provenance
    while step is not None:
        found.append(step)
        step = step.get("parent")
    return found[::-1]
