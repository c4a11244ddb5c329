"""A model that was exported, or that others trained, becomes a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanollm import __version__
from nanollm.bundle import FILES, is_bundle, save_bundle
from nanollm.durable import check_replaceable
from nanollm.export.import_model import Checkpoint, import_model, read_checkpoint
from nanollm.progress import say

POSITIONAL = ("folder",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make a bundle of a model in transformers' layout: one that NanoLLM exported, or another of the shape of
    DeepSeek-V3 or GLM-4-MoE-Lite with a SentencePiece tokenizer."""

    folder: Path
    """Folder with config.json, model.safetensors (or several with an index) and tokenizer.model."""
    out: Path
    """Folder of the bundle."""
    force: bool = False
    """Replace the bundle that lies at out."""


def run(c: Config) -> Path:
    """The folder of the bundle."""
    check_out(c)
    found = read_checkpoint(c.folder)
    try:
        model = import_model(found)
    except ValueError as error:
        raise ValueError(f"{c.folder}: {error}") from error
    for note in model.notes:
        say(note)
    say(f"{model.config.total_parameters:,} parameters, {model.tokenizer.vocab_size:,} pieces")
    provenance = history_of(found, c.folder.resolve().name, model.notes)
    return save_bundle(c.out, model.config, model.weights, model.tokenizer, provenance)


def check_out(c: Config) -> None:
    """Refuse a place for the bundle where something else would be lost."""
    if c.folder.resolve().is_relative_to(c.out.resolve()):
        raise ValueError(f"{c.out} holds the model that is imported; choose another --out")
    check_replaceable(c.out, FILES if is_bundle(c.out) else (), force=c.force, what="a bundle")


def history_of(found: Checkpoint, name: str, notes: Sequence[str]) -> dict[str, Any]:
    """The provenance of the bundle: that of the exported one, with the import behind it.

    What others trained has no parent: whatever it can do, it has not learnt to reply between our marks.
    """
    made_by = f"nanollm {__version__} import, torch {torch.__version__}"
    history = found.history or {"made_by": made_by}
    this = {
        "made_by": made_by,
        "folder": name,
        "format": found.words["model_type"],
        "files": found.files,
        "changes": [*notes],
    }
    return {**history, "imports": [*history.get("imports", []), this]}
