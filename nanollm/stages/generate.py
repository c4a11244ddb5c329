"""A prompt becomes a continuation, or a question a reply."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanollm.bundle import load_bundle
from nanollm.config import check_at_least
from nanollm.generate.engine import generate
from nanollm.generate.request import Quantize
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.tools import tool_caller, with_tools
from nanollm.text.chat import Conversation, encode_prompt, reply_borders, reply_ends
from nanollm.text.stream import TextStream, check_stops
from nanollm.text.tokenizer import Tokenizer
from nanollm.world import DeviceName, DtypeName, World

POSITIONAL = ("bundle",)
BETWEEN = "-" * 40  # two continuations, which may hold blank lines themselves


@dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """Continue one or more prompts with a trained model."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/pretrain/bundle."""
    prompt: list[str]
    """Prompts; several are continued as one batch and printed with dashes in between."""
    chat: bool = False
    """Treat each prompt as a user message and reply to it instead of continuing it."""
    max_tokens: int = 128
    """Maximum length of a continuation in tokens."""
    seed: int = 0
    """Prompt i draws from seed + i."""
    stop: list[str] = field(default_factory=list)
    """Texts at which a continuation ends; they are left out."""
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
        check_stops(self.stop)
        check_at_least(1, self, "max_tokens")


def run(c: Config) -> str:
    """The prompts with their continuations, in order."""
    world = World.start(c.device, c.dtype)
    bundle = with_tools(load_bundle(c.bundle, world.dtype, world.device), c.tools)
    tokenizer = bundle.tokenizer

    completions = generate(
        bundle.model,
        [encode(prompt, tokenizer, c.chat) for prompt in c.prompt],
        c,
        max_tokens=c.max_tokens,
        stop_token_ids=reply_borders(tokenizer) if c.chat else reply_ends(tokenizer),
        seed=c.seed,
        stop=(lambda: TextStream(tokenizer, c.stop).stops_at) if c.stop else None,
        tool=tool_caller(bundle),
        quantize=c.quantize,
    )
    lines = []
    for prompt, completion in zip(c.prompt, completions, strict=True):
        text = text_of(completion.ids, tokenizer, c.stop)
        record = {"prompt": prompt, "text": text, "tokens": len(completion.ids), "finish": completion.finish}
        plain = text if c.chat else prompt + text
        lines.append(json.dumps(record, ensure_ascii=False) if c.json else plain)
    return ("\n" if c.json else f"\n{BETWEEN}\n").join(lines)


def encode(prompt: str, tokenizer: Tokenizer, is_chat: bool) -> list[int]:
    """The ids that are continued: of a text that has just begun, or up to where the assistant replies."""
    if is_chat:
        return encode_prompt(Conversation.of(prompt), tokenizer)
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def text_of(ids: Sequence[int], tokenizer: Tokenizer, stops: Sequence[str]) -> str:
    """The text of the ids, up to the first stop text in it."""
    stream = TextStream(tokenizer, stops)
    return "".join(map(stream.push, ids)) + stream.close()
