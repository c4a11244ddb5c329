"""What passes through the door between training and everything after it?

A folder: config.json (the model's shape), model.safetensors (its weights), tokenizer.model, provenance.json (where it
comes from, and the sha256 of the other three). Nothing in it is code and nothing is unpickled.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanollm.durable import new_folder, settle, sha256_of, write_file, write_json
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.text.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER, PROVENANCE = "config.json", "model.safetensors", "tokenizer.model", "provenance.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER, PROVENANCE)
FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A model that can be used: its weights, its tokenizer and its history."""

    model: Transformer
    tokenizer: Tokenizer
    provenance: dict[str, Any]

    @property
    def is_base(self) -> bool:
        """Whether it was only pretrained: what learnt to reply has a parent."""
        return "parent" not in self.provenance


def save_bundle(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    provenance: Mapping[str, Any],
) -> Path:
    """Write a bundle in one moment; `weights` by the names of Transformer's state_dict, any float type."""
    with new_folder(folder) as draft:
        write_json(draft / CONFIG, {"format": FORMAT, "model": dataclasses.asdict(config)})
        write_tensors(draft / WEIGHTS, weights)
        write_file(draft / TOKENIZER, tokenizer.serialized)
        files = {name: sha256_of(draft / name) for name in (CONFIG, WEIGHTS, TOKENIZER)}
        write_json(draft / PROVENANCE, {**provenance, "files": files})
    return folder


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; raises OSError when the disk is full, as any other write."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # save_file would let nobody else read it
    try:
        save_file(on_cpu, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    path.chmod(mode)


def load_bundle(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Bundle:
    """Read a bundle, check every file against its sha256, and let the model compute in `dtype` on `device`."""
    folder = Path(folder)
    settle(folder)
    provenance = _read_json(folder, PROVENANCE)
    digests = provenance.get("files")
    if not isinstance(digests, dict) or digests.keys() != {CONFIG, WEIGHTS, TOKENIZER}:
        raise ValueError(f"{folder / PROVENANCE} does not list the files of a bundle; copy the bundle again")
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, {PROVENANCE} names it; copy the bundle again")
        if sha256_of(folder / name) != digest:
            raise ValueError(f"{folder / name} was changed after it was written; copy the bundle again")
    model = build_model(read_config(folder))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {' '.join(str(error).split())[:300]}") from error
    for parameter in model.parameters():  # not the buffers: the balance bias stays float32
        parameter.data = parameter.data.to(dtype)
    return Bundle(model.to(device).eval(), Tokenizer.load(folder / TOKENIZER), provenance)


def build_model(config: ModelConfig) -> Transformer:
    """A Transformer whose parameters have no values and no memory yet; its buffers do."""
    with torch.device("meta"):
        model = Transformer(config)
    for layer in model.moe_layers():
        layer.load = torch.zeros_like(layer.load, device="cpu")
    return model


def read_config(folder: Path) -> ModelConfig:
    """The shape of a bundle's model."""
    record = _read_json(folder, CONFIG)
    if "format" not in record:
        raise ValueError(
            f"{folder} is not a bundle: its {CONFIG} is another's; nanollm import makes a bundle of models"
        )
    if record["format"] != FORMAT:
        raise ValueError(f"{folder / CONFIG}: expected format {FORMAT}, got {record.get('format')!r}; update nanollm")
    try:
        return ModelConfig(**record["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from error


def is_bundle(folder: Path) -> bool:
    """Whether a bundle lies in this folder, in whatever state."""
    try:
        return _read_json(folder, CONFIG).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that holds every weight of a bundle as it is kept; the router's bias is float32 in any case."""
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith("balance_bias")]  # noqa: SIM118 (no dict)
            found = {kinds[file.get_slice(name).get_dtype()] for name in names}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{folder / WEIGHTS} is not a bundle's ({error}); copy the bundle again") from error
    return found.pop() if len(found) == 1 else torch.float32


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        found = f"no {name} in it" if folder.is_dir() else "it is a file" if folder.exists() else "no such folder"
        hint = "a training run writes one to its folder `bundle` when it is finished"
        if (folder / "bundle").is_dir():
            hint = f"did you mean {folder / 'bundle'}?"
        raise FileNotFoundError(f"{folder} is not a bundle ({found}); {hint}")
    try:
        record = json.loads((folder / name).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / name} is not valid JSON ({error}); copy the bundle again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, got {type(record).__name__}")
    return record
