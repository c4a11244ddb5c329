"""What must change before a model that others trained is one of ours?

Its blocks: only where an export of ours wrote dense blocks as Mixtures of Experts. Its tokenizer: ours lose nothing and
let no text spell a mark, so normalising, and the space that SentencePiece puts before a text, are switched off; every
id keeps its piece, and a text that begins with a space and was normal already keeps its ids. The marks of a chat take
ids that the model has and its tokenizer does not use, and after those new ones, whose rows are the mean of all rows:
then a new id is about as likely as the others (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanollm.bundle import CONFIG, TOKENIZER
from nanollm.export.checkpoint import Checkpoint
from nanollm.export.dense import Placement, take_back
from nanollm.export.hf import ORIGIN
from nanollm.export.names import config_of, to_ours
from nanollm.extras import missing_package
from nanollm.model.config import ModelConfig
from nanollm.text.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer

LATENT_EPS = 1e-6
"""What transformers takes for the norms of the latents, whatever config.json says."""
WITH_A_ROW_PER_ID = ("trunk.embed.weight", "head.weight")


@dataclass(frozen=True)
class Adopted:
    """The parts of a bundle."""

    config: ModelConfig
    weights: dict[str, Tensor]  # by the names of Transformer's state_dict
    tokenizer: Tokenizer
    notes: tuple[str, ...]
    """What was changed, one sentence each."""


def adopt(found: Checkpoint) -> Adopted:
    """A checkpoint as the parts of a bundle; ValueError for what a bundle cannot express."""
    try:
        config = config_of(found.words)
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
    tokenizer = adopt_tokenizer(found.tokenizer, config.vocab_size, found.added_tokens, notes)
    if (count := tokenizer.vocab_size - config.vocab_size) > 0:
        weights |= {name: with_rows(weights[name], count) for name in WITH_A_ROW_PER_ID}
        config = replace(config, vocab_size=tokenizer.vocab_size)
        notes.append(f"the last {count} ids are new to the model: their rows are the mean of all rows")
    return Adopted(config, weights, tokenizer, tuple(notes))


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
        return placement.before, take_back(weights, placement)
    except ValueError as error:
        notes.append(f"the blocks that were dense stay Mixtures of Experts ({error})")
        return config, weights


def is_same(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs describe one model: other numbers may say which blocks are Mixtures of Experts."""
    alike = replace(one, moe_every=other.moe_every, n_dense_first=other.n_dense_first) == other
    return alike and all(one.is_moe(block) == other.is_moe(block) for block in range(other.n_blocks))


# --- the tokenizer ---


def adopt_tokenizer(serialized: bytes, rows: int, added: Mapping[int, str], notes: list[str]) -> Tokenizer:
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
