"""What may stand in an eval.json, and what does each key mean?

eval.schema.json answers as JSON Schema, for programs, and `python -m nanollm.evals.schema` prints it as tables, for
docs/evaluation.md. tests/evals/test_schema.py holds both to what nanollm eval writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("eval.schema.json")

Schema = dict[str, Any]


def load() -> Schema:
    schema: Schema = json.loads(FILE.read_text(encoding="utf-8"))
    return schema


def tables() -> str:
    """One table for the whole file, and one for each object in it."""
    schema = load()
    parts = [f"**eval.json** {schema['description']}", *_table(schema)]
    for name, definition in schema["$defs"].items():
        parts += ["", f"**{name}** {definition['description']}", *_table(definition)]
    return "\n".join(parts)


def _table(schema: Schema) -> Iterator[str]:
    yield from ("", "| key | holds | |", "|---|---|---|")
    for key, value in schema["properties"].items():
        holds = kind(value) + ("" if key in schema["required"] else ", or missing")
        yield f"| `{key}` | {holds} | {value['description']} |"


def kind(schema: Schema) -> str:
    """The type of a value in words."""
    if "$ref" in schema:
        return f"**{schema['$ref'].rpartition('/')[2]}**"
    if "items" in schema:
        return f"list: {kind(schema['items'])}"
    if "propertyNames" in schema:
        return f"{schema['propertyNames']['title']} → {kind(schema['additionalProperties'])}"
    types = schema.get("type", "any value")
    return types if isinstance(types, str) else " or ".join(types)


if __name__ == "__main__":
    print(tables())
