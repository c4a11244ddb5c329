"""A folder in transformers' layout becomes the parts of a bundle: an export of ours, or a model that others trained.

Only JSON, safetensors and SentencePiece are read, so nothing in the folder can run code. The weights are mapped, not
read: a tensor takes no memory before it is used.
Blocks change only where an export of ours wrote dense blocks as Mixtures of Experts. Our tokenizers lose nothing and
let no text spell a mark, so normalising, and the space that SentencePiece puts before a text, are switched off; every
id keeps its piece, and a text that begins with a space and was normal already keeps its ids. The marks of a chat take
ids that the model has and its tokenizer does not use, and after those new ones, whose rows are the mean of all rows:
then a new id is about as likely as the others (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
Source: the layout of transformers' save_pretrained; safetensors' README for the files, the index and its shards.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanollm.bundle import CONFIG, PROVENANCE, TOKENIZER, WEIGHTS, check_header
from nanollm.durable import read_json, sha256_of
from nanollm.export import provenance
from nanollm.export.dense_to_moe import Placement, moe_to_dense
from nanollm.export.hf import INDEX, ORIGIN
from nanollm.export.names import SIZES, from_hf_config, to_ours
from nanollm.extras import missing_package
from nanollm.model.config import ModelConfig
from nanollm.text.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer, read_model

MODEL_TYPES = ("deepseek_v3", "glm4_moe_lite")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
LATENT_EPS = 1e-6
"""What transformers takes for the norms of the latents, whatever config.json says."""
WITH_A_ROW_PER_ID = ("trunk.embed.weight", "head.weight")


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
    provenance.check(record)
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


# --- its weights ---


def shards_of(folder: Path) -> dict[str, set[str] | None]:
    """The safetensors files, and which tensors the index promises in each; None: there is no index."""
    if (folder / INDEX).is_file() and (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has both {WEIGHTS} and {INDEX}; delete the one that is older")
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{folder / INDEX} has no weight_map; copy it again")
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


# --- its tokenizer's other files ---


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


# --- what becomes of it ---


@dataclass(frozen=True)
class ImportedModel:
    """The parts of a bundle."""

    config: ModelConfig
    weights: dict[str, Tensor]  # by the names of Transformer's state_dict
    tokenizer: Tokenizer
    notes: tuple[str, ...]
    """What was changed, one sentence each."""


def import_model(found: Checkpoint) -> ImportedModel:
    """A checkpoint as the parts of a bundle; ValueError for what a bundle cannot express."""
    try:
        config = from_hf_config(found.words)
    except (AttributeError, OverflowError, TypeError) as error:
        raise ValueError(f"{CONFIG} holds a value of the wrong kind: {error}") from error
    weights = to_ours(found.weights, config)
    for name in weights:
        if name.endswith("balance_bias"):
            weights[name] = weights[name].float()  # in every bundle
    notes = list(found.notes)
    if config.rms_norm_eps != LATENT_EPS:
        notes.append(
            f"rms_norm_eps {config.rms_norm_eps:g} holds for the norms of the latents as well, where transformers "
            f"takes {LATENT_EPS:g}"
        )
    config, weights = with_dense_blocks(config, weights, found.words.get(ORIGIN), notes)
    tokenizer = import_tokenizer(found.tokenizer, config.vocab_size, found.added_tokens, notes)
    if (count := tokenizer.vocab_size - config.vocab_size) > 0:
        weights |= {name: with_rows(weights[name], count) for name in WITH_A_ROW_PER_ID}
        config = replace(config, vocab_size=tokenizer.vocab_size)
        notes.append(f"the last {count} ids are new to the model: their rows are the mean of all rows")
    return ImportedModel(config, weights, tokenizer, tuple(notes))


def with_rows(matrix: Tensor, count: int) -> Tensor:
    """(V, D) with `count` rows more, each the mean of all."""
    mean = matrix.mean(0, keepdim=True, dtype=torch.float32).to(matrix.dtype)
    return torch.cat((matrix, mean.expand(count, -1)))


def with_dense_blocks(
    config: ModelConfig, weights: dict[str, Tensor], origin: object, notes: list[str]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model as it was before an export wrote its dense blocks as Mixtures of Experts, if one did."""
    if not isinstance(origin, dict) or origin.get("n_blocks") != config.n_blocks:
        return config, weights
    try:
        placement = Placement.of(ModelConfig(**origin | {"context_length": config.context_length}))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{CONFIG}: {ORIGIN} does not describe the shape of a bundle: {error}") from error
    if is_same(placement.before, config):
        return placement.before, weights
    if not is_same(placement.after, config):
        notes.append(f"{CONFIG} was changed since NanoLLM wrote it: blocks stay as they are described")
        return config, weights
    try:
        return placement.before, moe_to_dense(weights, placement)
    except ValueError as error:
        notes.append(f"the blocks that were dense stay Mixtures of Experts ({error})")
        return config, weights


def is_same(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs describe one model: other numbers may say which blocks are Mixtures of Experts."""
    alike = replace(one, moe_every=other.moe_every, n_dense_first=other.n_dense_first) == other
    return alike and all(one.is_moe(block) == other.is_moe(block) for block in range(other.n_blocks))


# --- the tokenizer ---


def import_tokenizer(serialized: bytes, rows: int, added: Mapping[int, str], notes: list[str]) -> Tokenizer:
    """A tokenizer of ours as it is; another's without what loses text, and with the marks of a chat.

    rows: the ids that the model has; added: tokens that the model knows beside the pieces, by their ids.
    """
    proto = parse(serialized)
    if len(proto.pieces) > rows:
        raise ValueError(f"{TOKENIZER} has {len(proto.pieces)} pieces, the model only {rows} ids; it is another's")
    changes = [*make_lossless(proto), *give_marks(proto, rows, added)]
    notes += changes
    return Tokenizer(proto.SerializeToString() if changes else serialized, TOKENIZER)


def parse(serialized: bytes) -> Any:
    """The SentencePiece model as a protobuf message, which can be changed."""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        raise missing_package("import", error.name, "export") from error
    try:
        proto = ModelProto.FromString(serialized)
    except DecodeError as error:
        raise ValueError(f"{TOKENIZER} is not a SentencePiece model") from error
    if not proto.pieces:
        raise ValueError(f"{TOKENIZER} is not a SentencePiece model")
    return proto


def make_lossless(proto: Any) -> Iterator[str]:
    """Switch off what loses text, and say what that changes; ValueError if it is not enough."""
    kinds = [piece.type for piece in proto.pieces]
    if kinds.count(proto.SentencePiece.BYTE) != 256:
        raise ValueError(f"{TOKENIZER} has no piece for every byte (byte_fallback), so it loses characters")
    trainer, normaliser = proto.trainer_spec, proto.normalizer_spec
    controls = {piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.CONTROL}
    if missing := {trainer.bos_piece, trainer.eos_piece} - controls:
        raise ValueError(f"{TOKENIZER} has no {' and no '.join(sorted(missing))}, with which texts begin and end")
    if normaliser.precompiled_charsmap:
        yield f"text is no longer normalised ({normaliser.name}): what that replaced is spelled as it is"
    if normaliser.remove_extra_whitespaces:
        yield "spaces are no longer removed at the ends of a text and in runs"
    if normaliser.add_dummy_prefix:
        yield "a text no longer gets a space in front: begin it with one where it should have the ids it had"
    if trainer.unk_surface:
        yield f"{trainer.unk_piece} stands for no text"
    normaliser.name, normaliser.precompiled_charsmap, normaliser.normalization_rule_tsv = "identity", b"", ""
    normaliser.add_dummy_prefix = normaliser.remove_extra_whitespaces = False
    trainer.unk_surface = ""
    proto.ClearField("denormalizer_spec")


def give_marks(proto: Any, rows: int, added: Mapping[int, str]) -> Iterator[str]:
    """Let <pad> and the marks of a chat be control symbols, and say which ids they have."""
    control, marks = proto.SentencePiece.CONTROL, [proto.trainer_spec.pad_piece, SYSTEM, USER, ASSISTANT, END]
    for piece in proto.pieces:
        if piece.piece in marks and piece.type != control:
            piece.type = control
            yield f"{piece.piece} is a control symbol: no text can spell it"
    known = {piece.piece for piece in proto.pieces}
    first = len(known)
    later = {token: text for token, text in added.items() if first <= token < rows and text not in known}
    missing = [mark for mark in marks if mark not in known | {*later.values()}]
    wanted = [token for token, text in later.items() if text in marks]
    while missing or max(wanted, default=0) >= len(proto.pieces):
        token = len(proto.pieces)
        text = later.get(token) or (missing.pop(0) if missing else f"<|unused_{token}|>")
        proto.pieces.add(piece=text, score=0.0, type=control)
    if new := [piece.piece for piece in proto.pieces[first:]]:
        yield f"the ids from {first} on are control symbols: {', '.join(new[:10])}{', ...' if len(new) > 10 else ''}"
