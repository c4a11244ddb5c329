"""Makes a bundle of an export, also after others trained it further."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import __version__
from nanollm.bundle import FILES, is_bundle, save_bundle
from nanollm.durable import check_replaceable
from nanollm.export.import_model import import_model
from nanollm.progress import say

POSITIONAL = ("folder",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make a bundle from a model that NanoLLM exported for transformers or vLLM, also if it was trained further
    elsewhere."""

    folder: Path
    """Folder with config.json, model.safetensors (or several with an index) and tokenizer.model."""
    out: Path
    """Folder of the bundle."""
    force: bool = False
    """Replace an existing bundle at --out."""


def run(c: Config) -> Path:
    """The folder of the bundle."""
    if c.folder.resolve().is_relative_to(c.out.resolve()):
        raise ValueError(f"{c.out} contains the model to import; choose another --out")
    check_replaceable(c.out, FILES if is_bundle(c.out) else (), force=c.force, what="a bundle")
    model = import_model(c.folder)
    for change in model.record["changes"]:
        say(change)
    say(f"{model.config.total_parameters:,} parameters, {model.tokenizer.vocab_size:,} pieces")
    made_by = f"nanollm {__version__} import, torch {torch.__version__}"
    history = model.history or {"made_by": made_by}
    provenance = {**history, "imports": [*history.get("imports", []), {"made_by": made_by, **model.record}]}
    return save_bundle(c.out, model.config, model.weights, model.tokenizer, provenance)
