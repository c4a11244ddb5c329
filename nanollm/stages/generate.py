"""A prompt becomes a continuation, or a question a reply."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from nanollm.bundle import load_bundle
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.text.chat import Conversation, encode_prompt, reply_ends, reply_text
from nanollm.text.tokenizer import Tokenizer
from nanollm.world import DeviceName, DtypeName, World

POSITIONAL = ("bundle",)


@dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """Continue one or more prompts with a trained model."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/pretrain/bundle."""
    prompt: list[str]
    """Prompts; several are continued as one batch."""
    chat: bool = False
    """Take each prompt as a user's message and reply to it, instead of continuing it."""
    max_tokens: int = 128
    """Most tokens of a continuation."""
    seed: int = 0
    """Prompt i draws from seed + i."""
    stop: list[str] = field(default_factory=list)
    """Texts at which a continuation ends; they are left out."""
    json: bool = False
    """Print one JSON object per prompt instead of text."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ValueError('--prompt expects at least one text, got none; for example --prompt "Once upon a time"')
        if "" in self.stop:
            raise ValueError("--stop expects texts of at least one character, got an empty one")


def run(c: Config) -> str:
    """The prompts with their continuations, in order."""
    world = World.start(c.device, c.dtype)
    bundle = load_bundle(c.bundle, world.dtype, world.device)
    tokenizer = bundle.tokenizer

    def stops(ids: list[int]) -> bool:
        return any(text in tokenizer.decode_drawn(ids) for text in c.stop)

    completions = generate(
        bundle.model,
        [encode(prompt, tokenizer, c.chat) for prompt in c.prompt],
        c,
        max_tokens=c.max_tokens,
        end_ids=reply_ends(tokenizer),
        seed=c.seed,
        stop=stops if c.stop else None,
    )
    lines = []
    for prompt, completion in zip(c.prompt, completions, strict=True):
        drawn = reply_text(completion.ids, tokenizer) if c.chat else tokenizer.decode_drawn(completion.ids)
        text = cut_at_stop(drawn, c.stop)
        record = {"prompt": prompt, "text": text, "tokens": len(completion.ids), "finish": completion.finish}
        plain = text if c.chat else prompt + text
        lines.append(json.dumps(record, ensure_ascii=False) if c.json else plain)
    return "\n".join(lines)


def encode(prompt: str, tokenizer: Tokenizer, is_chat: bool) -> list[int]:
    """The ids that are continued: of a text that has just begun, or up to where the assistant replies."""
    if is_chat:
        return encode_prompt(Conversation.of(prompt), tokenizer)
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
