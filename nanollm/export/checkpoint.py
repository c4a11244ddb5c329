"""What lies in a folder that another program wrote: a config.json, weights, a tokenizer?

Only JSON, safetensors and SentencePiece are read, so nothing in the folder can run code. The weights are mapped, not
read: a tensor takes no memory before it is used.
Source: the layout of transformers' save_pretrained; safetensors' README for the files, the index and its shards.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanollm.bundle import CONFIG, MOST_TENSORS, PROVENANCE, TOKENIZER, WEIGHTS, check_header
from nanollm.durable import read_json, sha256_of
from nanollm.export import history
from nanollm.export.names import SIZES
from nanollm.text.tokenizer import read_model

MODEL_TYPES = ("deepseek_v3", "glm4_moe_lite")
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Checkpoint:
    """A model as its folder tells of it."""

    words: dict[str, Any]
    """config.json."""
    weights: dict[str, Tensor]
    """By the names of the files, mapped from them; only what the model of config.json consists of."""
    tokenizer: bytes
    """A SentencePiece model."""
    added_tokens: dict[int, str]
    """Tokens that the tokenizer's other files name beside it, by their ids."""
    history: dict[str, Any] | None
    """The provenance of the bundle, if NanoLLM exported it."""
    files: dict[str, str]
    """sha256 of config, weights and tokenizer, by file."""
    notes: tuple[str, ...]
    """What is taken otherwise than it lies there, one sentence each."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder of save_pretrained's layout; ValueError or OSError in one line for what is not one."""
    words = read_words(folder)
    if not (folder / TOKENIZER).is_file():
        hint = "; tokenizer.json alone does not do: only SentencePiece's own file tells how text is normalised"
        raise FileNotFoundError(
            f"{folder} has no {TOKENIZER}, the SentencePiece model of its tokenizer"
            + (hint if (folder / "tokenizer.json").is_file() else "")
        )
    shards = shards_of(folder)
    stored = {name: tensor for file, names in shards.items() for name, tensor in mapped(folder / file, names).items()}
    weights, notes = own_tensors(stored, words)
    check_sizes(words, weights)
    return Checkpoint(
        words,
        weights,
        read_model(folder / TOKENIZER),
        dict(added_tokens(folder)),
        read_history(folder / PROVENANCE),
        {name: sha256_of(folder / name) for name in (CONFIG, TOKENIZER, *shards)},
        tuple(notes),
    )


def read_history(path: Path) -> dict[str, Any] | None:
    """What an export of ours tells of the bundle; None: nothing. What it says of itself is left out."""
    if not path.is_file():
        return None
    record = read_json(path)
    history.check(record)
    return {name: value for name, value in record.items() if name != "export"}


def read_words(folder: Path) -> dict[str, Any]:
    """config.json of a class that we know."""
    if not (folder / CONFIG).is_file():
        found = f"there is no {CONFIG} in it" if folder.is_dir() else "it is a file" if folder.exists() else "no folder"
        if any(folder.glob("*.gguf")):
            found = "it holds a GGUF, which import does not read"
        raise FileNotFoundError(
            f"{folder} is not a model to import ({found}); expected a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}, "
            f"such as `hf download USER/NAME --local-dir DIR` makes"
        )
    words = read_json(folder / CONFIG)
    if "model" in words and "format" in words:
        raise ValueError(f"{folder} is a bundle already; use it as it is")
    if (kind := words.get("model_type")) not in MODEL_TYPES:
        raise ValueError(f"{folder / CONFIG}: model_type: expected {' or '.join(MODEL_TYPES)}, got {kind}")
    if "quantization_config" in words:
        raise ValueError(
            f"{folder} is quantised (quantization_config in {CONFIG}); import the weights it was made from, in "
            f"float32, bfloat16 or float16"
        )
    return words


# --- weights ---


def shards_of(folder: Path) -> dict[str, set[str] | None]:
    """The safetensors files, and which tensors the index promises in each; None: there is no index."""
    if (folder / INDEX).is_file() and (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has both {WEIGHTS} and {INDEX}; delete the one that is older")
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{folder / INDEX} has no weight_map; copy it again")
        refuse_too_many(places, folder / INDEX)
        promised: dict[str, set[str]] = {}
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX} names {file!r}, expected safetensors files of the same folder")
            promised.setdefault(file, set()).add(name)
        return dict(sorted(promised.items()))
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code when it is read; import "
            f"needs {WEIGHTS} (load it with transformers where you trust it, and save_pretrained)"
        )
    raise FileNotFoundError(f"{folder} has no weights; expected {WEIGHTS} or {INDEX}")


def mapped(path: Path, promised: set[str] | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, {INDEX} names it; copy the model again")
    check_header(path)
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            refuse_too_many(names, path)
            if promised is not None and (wrong := promised ^ {*names}):
                name = min(wrong)
                place = f"should be in {path} and is not" if name in promised else f"is in {path}, but not in {INDEX}"
                raise ValueError(f"the tensor {name} {place}; copy the model again")
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name} must be float32, bfloat16 or float16, got {kind}; import knows no other")
    return tensors


def refuse_too_many(names: Collection[str], path: Path) -> None:
    """Each tensor takes memory before anybody looks at it."""
    if len(names) > MOST_TENSORS:
        raise ValueError(f"{path} is no model: {len(names):,} tensors, expected at most {MOST_TENSORS:,}")


def own_tensors(stored: Mapping[str, Tensor], words: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the model itself, its head among them, and what was done to get there."""
    notes, extra = [], words.get("num_nextn_predict_layers", words.get("num_mtp_layers"))
    weights = dict(stored)
    if isinstance(extra, int) and isinstance(blocks := words.get("num_hidden_layers"), int):
        weights = {name: weight for name, weight in stored.items() if not blocks <= layer_of(name) < blocks + extra}
    if len(weights) < len(stored):
        notes.append("the layers that predict further tokens (num_nextn_predict_layers) are left out")
    if words.get("tie_word_embeddings") and EMBEDDING in weights:
        weights[HEAD] = weights[EMBEDDING].clone()
        notes.append("the head was the embedding (tie_word_embeddings); it is a copy of it from now on")
    return weights, notes


def layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 for those outside."""
    match = LAYER.match(name)
    return int(match[1]) if match else -1


def check_sizes(words: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse sizes that no tensor bears out: to describe a model of a billion blocks takes memory, too."""
    layers = len({layer_of(name) for name in weights} - {-1})
    if isinstance(blocks := words.get("num_hidden_layers"), int) and blocks > layers:
        raise ValueError(f"{CONFIG}: num_hidden_layers is {blocks}, but the weights have {layers} layers")
    longest = max((max(tensor.shape, default=1) for tensor in weights.values() if tensor.numel()), default=1)
    for name in SIZES.values():
        value = words.get(name)
        if name != "max_position_embeddings" and isinstance(value, int) and value > longest:
            raise ValueError(f"{CONFIG}: {name} is {value}, but the longest side of a tensor is {longest}")


# --- tokenizer ---


def added_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    """What transformers' tokenizer files name beside the SentencePiece model: (id, text)."""
    for file, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        if (folder / file).is_file():
            named = read_json(folder / file).get(key, {})
            try:
                for token in named:  # a list of tokens with their ids, or an object by ids
                    about = named[token] if isinstance(named, dict) else token
                    yield int(about.get("id", token)), str(about["content"])
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                raise ValueError(f"{folder / file}: {key} does not list tokens with their ids ({error})") from error
