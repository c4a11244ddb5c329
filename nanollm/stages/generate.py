"""A prompt becomes a continuation, or a question a reply."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollm.generate.model import GenerateConfig, load
from nanollm.generate.request import Quantize
from nanollm.world import DeviceName, DtypeName

POSITIONAL = ("bundle",)
BETWEEN = "-" * 40  # two continuations, which may hold blank lines themselves


@dataclass(frozen=True, kw_only=True)
class Config(GenerateConfig):
    """Continue one or more prompts with a trained model."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/pretrain/bundle."""
    prompt: list[str]
    """Prompts; several are continued as one batch and printed with dashes in between."""
    chat: bool = False
    """Treat each prompt as a user message and reply to it instead of continuing it."""
    json: bool = False
    """Print one JSON object per prompt instead of text."""
    schema: Path | None = None
    """File of a JSON schema that each continuation or reply follows."""
    tools: list[str] | None = None
    """Tools that the model may call while it writes, such as calculator. null: those the model was trained with; none:
    no tools."""
    quantize: Quantize = "none"
    """int8: one byte per weight, with a scale for each output; int4: four bits, with a scale for every 32 weights."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ValueError('--prompt expects at least one text, got none; for example --prompt "Once upon a time"')


def run(c: Config) -> str:
    """The prompts with their continuations, in order."""
    model = load(c.bundle, tools=c.tools, quantize=c.quantize, device=c.device, dtype=c.dtype)
    schema = None if c.schema is None else read_schema(c.schema)
    replies = model.complete(c.prompt, c, schema, is_chat=c.chat)
    lines = []
    for prompt, (text, completion) in zip(c.prompt, replies, strict=True):
        record = {"prompt": prompt, "text": text, "tokens": len(completion.ids), "finish": completion.finish}
        plain = text if c.chat else prompt + text
        lines.append(json.dumps(record, ensure_ascii=False) if c.json else plain)
    return ("\n" if c.json else f"\n{BETWEEN}\n").join(lines)


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from a file."""
    try:
        schema = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{path} must hold a JSON schema, which is an object, got {schema!r:.60}")
    return schema
