"""Saves and loads bundles: all that passes from training to everything after it.

A folder: config.json (the model's shape), model.safetensors (its weights), tokenizer.model, provenance.json (where it
comes from, and the sha256 of the other three). Nothing in it is code and nothing is unpickled; both JSON files carry
their own sha256. A folder may be another's: sizes are believed only when the weights bear them out.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanollm.durable import new_folder, read_json, read_sealed_json, recover, sha256_of, write_file, write_sealed_json
from nanollm.model.config import ModelConfig
from nanollm.model.lora import LoraConfig, merged
from nanollm.model.transformer import Transformer
from nanollm.text.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER, PROVENANCE = "config.json", "model.safetensors", "tokenizer.model", "provenance.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER, PROVENANCE)
ADAPTER, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
FORMAT = 2
MAX_TENSORS = 200_000  # a file that names more is no model: each takes memory before it is looked at,
MAX_HEADER_BYTES = 2**24  # and so does the header of a safetensors file,
MAX_JSON_BYTES = 2**22  # and what stands in JSON
BLOCK = re.compile(r"trunk\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class Bundle:
    """A model that can be used: its weights, its tokenizer and its history."""

    model: Transformer
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    tools: list[str] = dataclasses.field(default_factory=list)
    """Names of what writes into its replies (generate/tools.py)."""

    @property
    def is_base(self) -> bool:
        """Whether it was only pretrained: what learnt to reply has a parent."""
        return "parent" not in self.provenance

    @property
    def examples(self) -> list[str]:
        """Questions to ask it: the first three that instruction tuning answered on the way."""
        provenance = self.provenance
        while isinstance(parent := provenance.get("parent"), dict):
            config = provenance.get("config")
            if isinstance(config, dict) and isinstance(asked := config.get("sample_prompts"), list):
                return [str(question) for question in asked[:3]]
            provenance = parent
        return []


def save_bundle(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    provenance: Mapping[str, Any],
) -> Path:
    """Write a bundle in one moment; `weights` by the names of Transformer's state_dict, any float type."""
    with new_folder(folder) as draft:
        write_sealed_json(draft / CONFIG, {"format": FORMAT, "model": dataclasses.asdict(config)})
        write_tensors(draft / WEIGHTS, weights)
        write_file(draft / TOKENIZER, tokenizer.serialized)
        files = {name: sha256_of(draft / name) for name in (CONFIG, WEIGHTS, TOKENIZER)}
        write_sealed_json(draft / PROVENANCE, {**provenance, "format": FORMAT, "files": files})
    return folder


def save_adapter(folder: Path, c: LoraConfig, weights: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Path:
    """Write an adapter (model/lora.py) in one moment; provenance is that of a model whose parent is its base.

    adapter.json names the sha256 of the base's weights; no other base is taken for it.
    """
    with new_folder(folder) as draft:
        write_tensors(draft / ADAPTER_WEIGHTS, weights)
        facts = {"format": FORMAT, **dataclasses.asdict(c), "base": provenance["parent"]["files"][WEIGHTS]}
        facts |= {"files": {ADAPTER_WEIGHTS: sha256_of(draft / ADAPTER_WEIGHTS)}, "provenance": provenance}
        write_sealed_json(draft / ADAPTER, facts)
    return folder


def load_adapter(folder: Path, base: Bundle) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Any]]:
    """An adapter of this base and of no other: its settings, weights and provenance."""
    recover(folder)
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"{folder} holds no {ADAPTER}; training with --lora.rank writes it to adapter/")
    facts = read_sealed_json(folder / ADAPTER, FORMAT, "copy the adapter again", MAX_JSON_BYTES)
    _check_format(folder / ADAPTER, facts)
    if (own := base.provenance["files"][WEIGHTS]) != facts["base"]:
        raise ValueError(
            f"{folder} was trained on weights {facts['base'][:6]}, this bundle has {own[:6]}; give the bundle it was "
            f"trained on"
        )
    path = folder / ADAPTER_WEIGHTS
    check_header(path)
    if sha256_of(path) != facts["files"][ADAPTER_WEIGHTS]:
        raise ValueError(f"{path} was changed after it was written; copy the adapter again")
    c = LoraConfig(**{field.name: facts[field.name] for field in dataclasses.fields(LoraConfig)})
    return c, load_file(path), facts["provenance"]


def save_merged(folder: Path, base: Path, adapter: Path) -> Path:
    """Write the bundle of a base with an adapter in its weights, in float32: W + alpha / rank * B A."""
    bundle = load_bundle(base)
    c, weights, provenance = load_adapter(adapter, bundle)
    both = merged(bundle.model.state_dict() | weights, c.scale)
    return save_bundle(folder, bundle.model.config, both, bundle.tokenizer, provenance)


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
    recover(folder)
    config, provenance = read_config(folder), _read_json(folder, PROVENANCE)
    _check_format(folder / PROVENANCE, provenance)
    digests = provenance.get("files")
    if not isinstance(digests, dict) or digests.keys() != {CONFIG, WEIGHTS, TOKENIZER}:
        raise ValueError(f"{folder / PROVENANCE} does not list the files of a bundle; copy the bundle again")
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, {PROVENANCE} names it; copy the bundle again")
        if sha256_of(folder / name) != digest:
            raise ValueError(f"{folder / name} was changed after it was written; copy the bundle again")
    model = build_model(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {' '.join(str(error).split())[:300]}") from error
    for parameter in model.parameters():  # not the buffers: the balance bias stays float32
        parameter.data = parameter.data.to(dtype)
    tools = tools_of(provenance, folder / PROVENANCE)
    return Bundle(model.to(device).eval(), Tokenizer.load(folder / TOKENIZER), provenance, tools)


def tools_of(provenance: Mapping[str, Any], path: Path) -> list[str]:
    """Names of the tools that a model was trained with; `path` is where its provenance was read."""
    tools = provenance.get("tools", [])
    if not (isinstance(tools, list) and all(isinstance(name, str) for name in tools)):
        raise ValueError(f"{path}: tools must be a list of names, got {tools!r:.80}")
    return tools


def load_reference(
    folder: Path, bundle: Bundle, dtype: torch.dtype, device: torch.device, called: str = "reference"
) -> Bundle:
    """Another bundle, with which one is compared in training: it must speak with the same ids."""
    reference = load_bundle(folder, dtype, device)
    own, other = bundle.tokenizer.fingerprint, reference.tokenizer.fingerprint
    if own != other:
        raise ValueError(
            f"the {called} {folder} has tokenizer {other[:6]}, the model {own[:6]}; a {called} must have the same one"
        )
    return reference


def build_model(config: ModelConfig) -> Transformer:
    """A Transformer whose parameters have no values and no memory yet; its buffers do."""
    with torch.device("meta"):
        model = Transformer(config)
    for layer in model.moe_layers():
        layer.load = torch.zeros_like(layer.load, device="cpu")
    return model


def read_config(folder: Path) -> ModelConfig:
    """The shape of a bundle's model, with as many blocks as its weights have."""
    record = _read_json(folder, CONFIG)
    if "format" not in record:
        raise ValueError(
            f"{folder} is not a bundle: its {CONFIG} is another's; nanollm import makes a bundle of models"
        )
    _check_format(folder / CONFIG, record)
    try:
        config = config_of(record["model"])
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from error
    blocks = {match[1] for name in shapes_in(folder / WEIGHTS) if (match := BLOCK.match(name))}
    if len(blocks) != config.n_blocks:  # to build a billion blocks, or only to count their parameters, takes for ever
        raise ValueError(f"{folder / CONFIG}: n_blocks is {config.n_blocks}, but the weights have {len(blocks)} blocks")
    return config


def _check_format(path: Path, record: Mapping[str, Any]) -> None:
    if record.get("format") != FORMAT:
        found = record.get("format")
        raise ValueError(f"{path}: expected format {FORMAT}, got {found!r}; take the version of nanollm that wrote it")


def config_of(sizes: Mapping[str, Any]) -> ModelConfig:
    """The shape in JSON; TypeError for a value of another kind than its field, but a whole number is a float, too."""
    kinds = get_type_hints(ModelConfig)
    for name, value in sizes.items():
        if type(value) is not kinds.get(name) and (kinds.get(name), type(value)) != (float, int):
            raise TypeError(f"{name} must be {getattr(kinds.get(name), '__name__', 'left out')}, got {value!r:.80}")
    return ModelConfig(**sizes)


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header says that it is longer than that of any model."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it again")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path} is not a whole safetensors file (a header of {size:,} bytes, expected at most "
            f"{MAX_HEADER_BYTES:,}); copy it again"
        )


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor in a safetensors file, whose numbers are not read."""
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > MAX_TENSORS:
                raise ValueError(f"{path} is no model: {len(names):,} tensors, expected at most {MAX_TENSORS:,}")
            return {name: file.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error


def is_bundle(folder: Path) -> bool:
    """Whether a bundle lies in this folder, in whatever state."""
    try:
        return read_json(folder / CONFIG).get("format") == FORMAT
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
    return read_sealed_json(folder / name, FORMAT, "copy the bundle again", MAX_JSON_BYTES)
