"""Spelling word by word: a text is cut where its parts, spelled one by one, have the ids of the whole.

Byte pair encoding starts from the characters and only ever joins two neighbours that together are a piece. Two
characters that stand side by side in no piece are therefore never joined, and what is left of them cannot change what
is right of them: a text may be cut there. Texts repeat their words, so each word is spelled once and remembered.

Characters that stand side by side in a piece are of one *kind* (and so are all that hang together in this way: the
letters, say, or the marks of punctuation). A mark may also lead into what follows marks: from `(foo` and `"The` the
letters and the marks do not become of one kind, since no piece has a mark behind a letter. A word is a run of one kind
with the spaces before it, and with what its last mark leads into; a character that no piece joins to another is a word
by itself. Longer words than necessary do no harm.
"""

import ctypes
import sys
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanollm.kernels import build

Ids = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
SPACE = "\u2581"  # as pieces write it
BORDER = "\ud800"  # in no piece, because it is not valid Unicode
FOLLOWING, LEADS = 1, 0x8000  # as in spelling.cpp
FOLLOWING_MARKS = "\ud801"  # stands for them while kinds are found
BPE = 2  # of the types of models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of the types of pieces
MAX_REMEMBERED = 100_000_000  # bytes, of two million words; then all are forgotten


def kinds_of(pieces: Iterable[str]) -> dict[str, int] | None:
    """The kind of each character that some piece joins to another, LEADS added where it leads into those of kind
    FOLLOWING; None where a piece may go on into a space."""
    leader: dict[str, str] = {FOLLOWING_MARKS: FOLLOWING_MARKS}
    leads = set[str]()

    def lead(char: str) -> str:
        while (up := leader.setdefault(char, char)) != char:
            leader[char] = leader[up]
            char = up
        return char

    for left, right in set(pairwise(BORDER.join(pieces))):
        if BORDER in (left, right) or left == SPACE:
            continue
        if right == SPACE:
            return None
        if is_mark(left) and not is_mark(right):
            leads.add(left)
            left = FOLLOWING_MARKS
        leader[lead(left)] = lead(right)
    number = {lead(FOLLOWING_MARKS): FOLLOWING}
    kinds = {char: number.setdefault(lead(char), len(number) + 1) for char in sorted(leader.keys() | leads)}
    del kinds[FOLLOWING_MARKS]
    return {char: kind + LEADS * (char in leads) for char, kind in kinds.items()}


def is_mark(char: str) -> bool:
    return char.isascii() and not char.isalnum()


class WordSpeller:
    """Spells texts word by word (spelling.cpp). NoCompilerError where the library cannot be made."""

    def __init__(self, recipe: "Recipe") -> None:
        self.library = library()
        assert recipe.kinds is not None
        kind_of = np.zeros(sys.maxunicode + 1, dtype=np.uint16)
        kind_of[[*map(ord, recipe.kinds)]] = [*recipe.kinds.values()]
        # A piece with a space as a space would be of no use: every space of a text is marked. NUL is no piece to
        # SentencePiece, which falls back to its byte.
        learned = {token: piece for token, piece in recipe.learned.items() if " " not in piece and piece != "\0"}
        pieces = [piece.replace(SPACE, " ").encode() for piece in learned.values()]
        tokens = np.array([*learned], dtype=np.int32)
        scores = np.array(recipe.scores, dtype=np.float32)[tokens]
        token_of = {piece: token for token, piece in enumerate(recipe.pieces)}
        byte_tokens = np.array([token_of[f"<0x{byte:02X}>"] for byte in range(256)], dtype=np.int32)
        self.handle = self.library.open_words(
            b"".join([*pieces, bytes(16)]),
            np.cumsum([*map(len, pieces)], dtype=np.int64),
            tokens,
            scores,
            len(pieces),
            byte_tokens,
            kind_of,
            MAX_REMEMBERED,
        )

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.library.close_words(self.handle)

    def spell(self, texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        """Ids of the texts (UTF-8), one after the other, and the number of each text's."""
        joined, ends = b"".join([*texts, bytes(16)]), np.cumsum([*map(len, texts)], dtype=np.int64)
        ids, lengths = np.empty(len(joined), dtype=np.int32), np.empty(len(texts), dtype=np.int64)
        count = self.library.spell_words(self.handle, joined, ends, len(texts), ids, lengths)
        return ids[:count], lengths


def count_words(texts: Sequence[bytes]) -> dict[bytes, int]:
    """How often each word comes in texts (UTF-8), by spelling.cpp; text/train_tokenizer.py says what a word is."""
    joined, ends = b"".join([*texts, bytes(16)]), np.cumsum([*map(len, texts)], dtype=np.int64)
    words, size = c_int64(), c_int64()
    counter = library().count_words(joined, ends, len(texts), byref(words), byref(size))
    found, starts = ctypes.create_string_buffer(size.value + 1), np.zeros(words.value + 1, dtype=np.int64)
    counts = np.empty(words.value, dtype=np.int64)
    library().take_words(counter, found, starts[1:], counts)
    text = found.raw
    return {text[a:b]: n for (a, b), n in zip(pairwise(starts.tolist()), counts.tolist(), strict=True)}


@cache
def library() -> ctypes.CDLL:
    """spelling.cpp, compiled for this processor; NoCompilerError with the reason where that fails."""
    loaded = build.load(Path(build.__file__).with_name("spelling.cpp"), OPTIONS)
    int64s, int32s, floats, kinds = (
        np.ctypeslib.ndpointer(dtype, flags="C_CONTIGUOUS") for dtype in (np.int64, np.int32, np.float32, np.uint16)
    )
    loaded.open_words.argtypes = [c_char_p, int64s, int32s, floats, c_int64, int32s, kinds, c_int64]
    loaded.open_words.restype = c_void_p
    loaded.close_words.argtypes, loaded.close_words.restype = [c_void_p], None
    loaded.spell_words.argtypes = [c_void_p, c_char_p, int64s, c_int64, int32s, int64s]
    loaded.spell_words.restype = c_int64
    loaded.count_words.argtypes = [c_char_p, int64s, c_int64, POINTER(c_int64), POINTER(c_int64)]
    loaded.count_words.restype = c_void_p
    loaded.take_words.argtypes, loaded.take_words.restype = [c_void_p, c_char_p, int64s, int64s], None
    return loaded


# --- what the file of a model says of itself ---


@dataclass(frozen=True)
class Recipe:
    """What of a SentencePiece model decides the ids of a text. Source: its sentencepiece_model.proto."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    model_type: int
    keeps_the_text: bool
    """Nothing happens to a text before it is spelled but that its spaces are marked."""

    @property
    def is_cuttable(self) -> bool:
        """Byte pair encoding with learned pieces only: those of a user, and those out of use, have their own rules."""
        symbols = (piece for piece, type_ in zip(self.pieces, self.types, strict=True) if type_ in (UNKNOWN, CONTROL))
        return (
            self.model_type == BPE
            and self.keeps_the_text
            and set(self.types) == {NORMAL, UNKNOWN, CONTROL, BYTE}
            and SPACE in self.pieces
            and all(len(symbol) > 1 for symbol in symbols)
            and self.kinds is not None
        )

    @cached_property
    def kinds(self) -> dict[str, int] | None:
        return kinds_of(self.learned.values())

    @cached_property
    def learned(self) -> dict[int, str]:
        return {token: self.pieces[token] for token, type_ in enumerate(self.types) if type_ == NORMAL}

    @classmethod
    def of(cls, serialized: bytes) -> "Recipe":
        """Read the file of a model. DecodeError for what is none."""
        from sentencepiece import sentencepiece_model_pb2 as proto

        model = proto.ModelProto.FromString(serialized)  # type: ignore[attr-defined]
        rules = model.normalizer_spec
        is_kept = not (rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces)
        return cls(
            [piece.piece for piece in model.pieces],
            [piece.score for piece in model.pieces],
            [piece.type for piece in model.pieces],
            model.trainer_spec.model_type,
            is_kept and rules.escape_whitespaces,
        )
