"""Writes our tokenizer into the files of other engines, with the same ids.

tokenizer.json (Hugging Face's tokenizers) gives the ids of `Tokenizer.encode`. Its pieces hold real spaces, so that a
literal U+2581, which SentencePiece alone would read as a space, is spelled in bytes there too and comes back. As every
such file does, it takes a text that spells a mark for the mark, unless it is asked with split_special_tokens=True
(transformers) or encode_special_tokens (tokenizers).

A unigram model chooses the most likely pieces. SentencePiece sums in float32, tokenizers in float64, so among equally
likely ones ("==" and "=", or "=" and "==") they may choose differently.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from nanollm.bundle import TOKENIZER
from nanollm.durable import write_file, write_json
from nanollm.text.chat import template_for
from nanollm.text.tokenizer import SPACE_MARK, Piece, Tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Write a tokenizer into an existing folder; ValueError for one that tokenizer.json cannot hold.

    context_length (tokens) is where transformers begins to warn that a text is too long.
    """
    backend = build(tokenizer)
    check_pieces(backend, tokenizer)
    special = special_tokens(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add what generate() refuses
        "padding_side": "left",  # generate() continues rows at their right
        "clean_up_tokenization_spaces": False,  # transformers 4 would change "a ." into "a."
    }
    tokenizer.save(folder / TOKENIZER)
    write_file(folder / "tokenizer.json", backend.to_str().encode())
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)
    write_file(folder / "chat_template.jinja", template_for(tokenizer.symbols.values()).encode())


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """The symbols that stand for no text, by transformers' names for what they do; those of a chat have none."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    ids |= {"unk_token": tokenizer.unk_id, "pad_token": tokenizer.pad_id}
    others = [symbol for token, symbol in tokenizer.symbols.items() if token not in ids.values()]
    # Versions 4 and 5 of transformers both know the last name.
    return {role: tokenizer.symbols[token] for role, token in ids.items()} | {"additional_special_tokens": others}


def build(tokenizer: Tokenizer) -> Backend:
    """The tokenizer as an object of Hugging Face's library. With add_special_tokens a text begins with <s>."""
    if tokenizer.model_type == "word":
        raise ValueError(
            "tokenizer.json can hold a tokenizer of the type bpe, unigram or char, this one is of the type word; "
            "train with another: nanollm tokenizer --model_type bpe ..."
        )
    backend = unigram(tokenizer) if tokenizer.model_type == "unigram" else bpe(tokenizer)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    begin = tokenizer.symbols[tokenizer.bos_id]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, tokenizer.bos_id)]
    )
    symbols = tokenizer.symbols.values()
    backend.add_special_tokens([AddedToken(symbol, special=True, normalized=False) for symbol in symbols])
    return backend


def bpe(tokenizer: Tokenizer) -> Backend:
    """SentencePiece joins neighbours that spell a piece, the best piece first: so list all pairs that spell each.

    A char model is one without pairs.
    """
    scores = {spelled(piece): piece.score for piece in tokenizer.pieces if piece.kind == "normal"}
    best_first = sorted(scores, key=lambda text: -scores[text]) if tokenizer.model_type == "bpe" else []
    merges = [
        (text[:at], text[at:])
        for text in best_first
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    ids = {spelled(piece): token for token, piece in enumerate(tokenizer.pieces)}
    return Backend(models.BPE(ids, merges, unk_token=tokenizer.symbols[tokenizer.unk_id], byte_fallback=True))


def unigram(tokenizer: Tokenizer) -> Backend:
    """SentencePiece keeps symbols and byte pieces out of its search. Here they are in it, and must never be found.

    They are less likely than their letters one by one. A letter of theirs without a piece is in no longer piece either:
    it is split off before the search, which changes nothing else.
    """
    scores = {spelled(piece): piece.score for piece in tokenizer.pieces if piece.kind == "normal"}
    apart = [piece.text for piece in tokenizer.pieces if piece.kind != "normal"]
    never = min(scores.values()) * (max(map(len, apart)) + 1)
    pieces = [(text, scores.get(text, never)) for text in map(spelled, tokenizer.pieces)]
    backend = Backend(models.Unigram(pieces, tokenizer.unk_id, byte_fallback=True))
    if alone := sorted(set("".join(apart)) - scores.keys()):
        letters = "|".join(f"\\x{{{ord(letter):x}}}" for letter in alone)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(letters), "isolated")
    return backend


def spelled(piece: Piece) -> str:
    """The text of a piece, with real spaces."""
    return piece.text.replace(SPACE_MARK, " ") if piece.kind == "normal" else piece.text


def check_pieces(backend: Backend, tokenizer: Tokenizer) -> None:
    """ValueError if a piece or mark, read as text, has other ids there: then another's tokenizer has one rule more."""
    backend.encode_special_tokens = True
    for text in map(spelled, tokenizer.pieces):
        ours, theirs = tokenizer.encode(text), backend.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise ValueError(
                f"tokenizer.json cannot hold this tokenizer: {text!r} is {ours}, there {theirs}; "
                f"train with another: nanollm tokenizer ..."
            )
    backend.encode_special_tokens = False
