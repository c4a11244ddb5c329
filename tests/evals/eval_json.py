"""docs/evaluation.md explains the keys of eval.json."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def undocumented(evaluation: dict[str, Any]) -> set[str]:
    """Keys at any depth without a row in a table of the page: it can know no names of graders, tasks and metrics."""
    measured = {key: value for key, value in evaluation.items() if key != "settings"}
    return set(keys(measured)) - set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE))


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(each)
