"""A bundle answers over HTTP: OpenAI's API, and a page to chat on."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanollm.bundle import ADAPTER, load_adapter, load_bundle, tools_of
from nanollm.config import check_at_least
from nanollm.extras import require
from nanollm.generate.engine import Engine
from nanollm.generate.request import Quantize
from nanollm.generate.tools import with_tools
from nanollm.model.lora import Pairs, pairs_of
from nanollm.progress import say
from nanollm.world import DeviceName, DtypeName, World

POSITIONAL = ("bundle",)
KEY_VARIABLE = "NANOLLM_API_KEY"
MAX_WAITING = 64
"""Replies that may wait for a row of the cache; beyond that the server answers 429."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serve a bundle over HTTP: /v1/chat/completions, /v1/completions and a chat page at /."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/sft/bundle."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback needs a key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key: str = field(default="", repr=False)
    """Key that clients must send. The variable NANOLLM_API_KEY is safer: other users can see command lines in `ps`."""
    model_name: str = "nanollm"
    """Model name in the API."""
    adapter: dict[str, Path] = field(default_factory=dict)
    """LoRA adapters of the bundle to serve as well, by their model names in the API: {math: runs/math/adapter}."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""
    tools: list[str] | None = None
    """Tools that the model may call while it replies, such as calculator. null: those the model was trained with; none:
    no tools."""
    quantize: Quantize = "none"
    """int8: one byte per weight, with a scale for each output; int4: four bits, with a scale for every 32 weights."""
    max_running: int = 16
    """Maximum number of replies generated at once; 64 more may wait."""
    deadline_s: float = 300.0
    """Time limit of a reply in seconds."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins of other pages that may call the server from a browser, such as http://localhost:3000."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port must be from 0 to 65,535, got {self.port}")
        for name in (self.model_name, *self.adapter):
            if not name or not name.isprintable() or "/" in name:
                option = "names in adapter" if name in self.adapter else "model_name"
                raise ValueError(f"{option} must be printable text without /, got {name!r}")
        if self.model_name in self.adapter:
            raise ValueError(f"adapter: {self.model_name!r} is the bundle's own name (model_name); choose another")
        check_at_least(1, self, "max_running")
        if not 0 < self.deadline_s < 1e6:
            raise ValueError(f"deadline_s must be above 0 seconds and below a million, got {self.deadline_s}")
        if "*" in self.cors_origins:
            raise ValueError("cors_origins must list origins one by one, got *: any page could use the model")
        for origin in self.cors_origins:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
                raise ValueError(f"cors_origins: expected origins such as http://localhost:3000, got {origin!r}")


def run(c: Config) -> None:
    """Serve until a signal comes; prints the address when it is ready."""
    require("serve", ("fastapi", "uvicorn", "prometheus_client", "llguidance"), "serve")
    from nanollm.serve.app import build_app
    from nanollm.serve.server import checked_key
    from nanollm.serve.server import run as run_server

    key = checked_key(c.api_key or os.environ.get(KEY_VARIABLE, ""), c.host)
    world = World.start(c.device, c.dtype)
    bundle = with_tools(load_bundle(c.bundle, world.dtype, world.device), c.tools)
    shape, models, adapters = bundle.model.config, {c.model_name: bundle}, dict[str, Pairs]()
    for name, folder in c.adapter.items():
        lora, weights, provenance = load_adapter(folder.expanduser(), bundle)  # within {...} no shell has done it
        try:
            adapters[name] = pairs_of(bundle.model, weights, lora.scale)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        adapted = replace(bundle, provenance=provenance, tools=tools_of(provenance, folder / ADAPTER))
        models[name] = with_tools(adapted, c.tools)
    beside = f"adapters {', '.join(adapters)}, " if adapters else ""
    say(
        f"{c.bundle}: {shape.total_parameters:,} parameters in {world.names['dtype']}, {beside}"
        f"{c.max_running} replies at once, {'clients need the key' if key else 'no key'}; Ctrl-C stops"
    )
    app = build_app(
        models,
        lambda: Engine(bundle.model, rows=c.max_running, quantize=c.quantize, adapters=adapters),
        api_key=key,
        capacity=c.max_running + MAX_WAITING,
        deadline_s=c.deadline_s,
        cors_origins=c.cors_origins,
    )
    run_server(app, c.host, c.port)
