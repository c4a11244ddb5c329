"""A prompt becomes a continuation, or a question a reply."""

import json
from dataclasses import dataclass
from pathlib import Path

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
    tools: list[str] | None = None
    """Tools that the model may call while it writes, such as calculator. null: those the model was trained with; none:
    no tools."""
    quantize: Quantize = "none"
    """int8: weights in one byte each, with a scale per output."""
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
    replies = model.complete(c.prompt, c, is_chat=c.chat)
    lines = []
    for prompt, (text, completion) in zip(c.prompt, replies, strict=True):
        record = {"prompt": prompt, "text": text, "tokens": len(completion.ids), "finish": completion.finish}
        plain = text if c.chat else prompt + text
        lines.append(json.dumps(record, ensure_ascii=False) if c.json else plain)
    return ("\n" if c.json else f"\n{BETWEEN}\n").join(lines)
