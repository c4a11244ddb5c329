"""A bundle answers over HTTP: OpenAI's API, and a page to chat on."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from nanollm.bundle import load_bundle
from nanollm.extras import missing_package
from nanollm.generate.engine import Engine
from nanollm.generate.request import Quantize
from nanollm.progress import say
from nanollm.serve.limits import Limits, is_loopback
from nanollm.world import DeviceName, DtypeName, World

POSITIONAL = ("bundle",)
KEY_VARIABLE = "NANOLLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Config(Limits):
    """Serve a bundle over HTTP: /v1/chat/completions, /v1/completions and a chat page at /."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/sft/bundle."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs a key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key: str = field(default="", repr=False)
    """Key that clients must send. Better in the variable NANOLLM_API_KEY: other users see a command line in `ps`."""
    model_name: str = "nanollm"
    """What clients call the model."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""
    quantize: Quantize = "none"
    """int8: weights in one byte each, with a scale per output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port must be from 0 to 65,535, got {self.port}")
        if not self.model_name or not self.model_name.isprintable() or "/" in self.model_name:
            raise ValueError(f"model_name must be printable text without /, got {self.model_name!r}")


def run(c: Config) -> None:
    """Serve until a signal comes; prints the address when it is ready."""
    key = checked_key(c.api_key or os.environ.get(KEY_VARIABLE, ""), c.host)
    try:
        from nanollm.serve.app import ServeConfig, build_app
        from nanollm.serve.server import run as run_server
    except ModuleNotFoundError as error:
        raise missing_package("serve", error.name, "serve") from error
    world = World.start(c.device, c.dtype)
    bundle = load_bundle(c.bundle, world.dtype, world.device)
    shape = bundle.model.config
    say(
        f"{c.bundle}: {shape.total_parameters:,} parameters in {world.names['dtype']}, "
        f"{c.max_running} replies at once, {'clients need the key' if key else 'no key'}; Ctrl-C stops"
    )
    app = build_app(
        bundle,
        ServeConfig(model_name=c.model_name, api_key=key, limits=c),
        lambda: Engine(bundle.model, rows=c.max_running, quantize=c.quantize),
    )
    run_server(app, c.host, c.port)


def checked_key(key: str, host: str) -> str:
    """The key, if it is one and this host is safe with it."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("the key must be printable ASCII without spaces, as it travels in a header")
    if not key and not is_loopback(host):
        raise ValueError(
            f"host {host} can be reached from other machines, so a key is needed: set {KEY_VARIABLE}; "
            f"or serve this machine only, with --host 127.0.0.1"
        )
    return key
