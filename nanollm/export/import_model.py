"""Turns an export of ours back into the parts of a bundle, also after others trained it further.

Only JSON, safetensors and SentencePiece are read, so nothing in the folder can run code. The weights are mapped, not
read: a tensor takes no memory before it is used.
The shape is the one that the export keeps in config.json under `nanollm`. Blocks that an export wrote as Mixtures of
Experts (export/dense_to_moe.py) become dense again, and attention that it widened (export/widen.py) narrow, unless
training has changed what was zero in them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanollm.bundle import CONFIG, PROVENANCE, TOKENIZER, WEIGHTS, check_header, config_of
from nanollm.durable import read_json, sha256_of
from nanollm.export import provenance
from nanollm.export.dense_to_moe import Placement, moe_to_dense
from nanollm.export.hf import ORIGIN
from nanollm.export.names import to_hf_config, to_ours
from nanollm.export.widen import WIDE_LATENT, WIDE_ROTARY, to_narrow, widened_shape
from nanollm.model.config import ModelConfig
from nanollm.text.tokenizer import Tokenizer

MODEL_TYPES = {"glm4_moe_lite": "compact", "deepseek_v3": "deepseek-v3"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = "_orig_mod."  # before the names of a model that was saved as torch.compile returned it
ROTARY = ".rotary_emb.inv_freq"  # a buffer that older versions of transformers saved
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ImportedModel:
    """The parts of a bundle, and where they come from."""

    config: ModelConfig
    weights: dict[str, Tensor]  # by the names of Transformer's state_dict
    tokenizer: Tokenizer
    history: dict[str, Any]  # the provenance of the bundle that was exported; empty where it lies there no more
    record: dict[str, Any]  # for provenance.json: folder, format, sha256 of each file, and changes, one sentence each


def import_model(folder: Path) -> ImportedModel:
    """Read an export of ours; ValueError or OSError in one line for anything else."""
    words = read_words(folder)
    if not (folder / TOKENIZER).is_file():
        raise FileNotFoundError(f"{folder} has no {TOKENIZER}; copy that of the export (tokenizer.json does not do)")
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}; pickled weights (.bin, .pt) are not read: they can run code"
        )
    stored = read_weights(files)
    try:
        shape = config_of(words[ORIGIN])
        config, weights, notes = restore(shape, words, stored)
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder / TOKENIZER} has {tokenizer.vocab_size} pieces, the model {config.vocab_size} ids")
    record = {
        "folder": folder.resolve().name,
        "format": MODEL_TYPES[words["model_type"]],
        "files": {file.name: sha256_of(file) for file in (folder / CONFIG, folder / TOKENIZER, *files)},
        "changes": notes,
    }
    history = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    provenance.check(history)
    history.pop("export", None)  # what the export says of itself
    return ImportedModel(config, weights, tokenizer, history, record)


def read_words(folder: Path) -> dict[str, Any]:
    """The config.json of an export."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; expected a folder that nanollm export wrote (no GGUF)")
    words = read_json(folder / CONFIG)
    if "model" in words and "format" in words:
        raise ValueError(f"{folder} is a bundle already; use it as it is")
    if ORIGIN not in words or words.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{folder / CONFIG} is not of an export: it has no {ORIGIN!r}; import reads those only")
    return words


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, mapped into memory."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        check_header(path)
        try:
            with safe_open(path, "pt") as file:
                found = {
                    name.removeprefix(COMPILED): file.get_tensor(name)
                    for name in file.keys()  # noqa: SIM118 (no dict)
                    if not name.endswith(ROTARY)
                }
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
        if twice := tensors.keys() & found:
            raise ValueError(f"{min(twice)} is in {path} and in another file; delete the files that are older")
        tensors |= found
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}; import knows no other")
    return tensors


def restore(
    shape: ModelConfig, words: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """The bundle's shape and weights, with dense blocks where they still are, and what is to be said about it."""
    layers = len({match[1] for name in stored if (match := LAYER.match(name))})
    if shape.n_blocks != layers:  # to build a million blocks takes memory, too
        raise ValueError(f"{CONFIG}: n_blocks is {shape.n_blocks}, but the weights have {layers} layers")
    wide = wide_shape(shape, words)
    placement = Placement.of(wide)
    exported = wide if words["model_type"] == "glm4_moe_lite" else placement.after
    for name, value in to_hf_config(exported).items():
        if name != "rope_parameters" and words.get(name, value) != value:
            raise ValueError(f"{CONFIG}: {name} must be {value!r}, as it was exported, got {words[name]!r}")
    weights = to_ours(stored, exported)
    for name in weights:
        if name.endswith("balance_bias"):
            weights[name] = weights[name].float()  # in every bundle
    notes: list[str] = []
    if wide != shape:
        try:
            weights, exported, wide = to_narrow(weights, shape, wide), Placement.of(shape).after, shape
        except ValueError as error:
            notes.append(f"the attention stays wide ({error})")
    if exported != wide:
        try:
            weights, exported = moe_to_dense(weights, Placement.of(wide)), wide
        except ValueError as error:
            notes.append(f"the blocks that were dense stay Mixtures of Experts ({error})")
    return exported, weights, notes


def wide_shape(shape: ModelConfig, words: Mapping[str, Any]) -> ModelConfig:
    """The shape with the attention that config.json tells of: widened by the export, or as it was."""
    told = words["model_type"], words.get("kv_lora_rank"), words.get("qk_rope_head_dim")
    return widened_shape(shape) if told == ("deepseek_v3", WIDE_LATENT, WIDE_ROTARY) else shape
