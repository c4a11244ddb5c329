"""The tokenizer: text to ids and back, without loss.

SentencePiece (arXiv:1808.06226), set up so that nothing is lost: `decode(encode(text)) == text` for every text that
is valid Unicode. Identity normalisation, no dummy prefix, no whitespace removal, digits one by one, and 256 byte
pieces for whatever has no piece of its own. The marks of a chat are *control* symbols: no text can spell one. Ids have
no fixed layout: ask the tokenizer for an id.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import sentencepiece

from nanollm.durable import write_file
from nanollm.kernels.build import NoCompilerError
from nanollm.progress import say
from nanollm.text.words import Recipe, WordSpeller

ModelType = Literal["bpe", "unigram", "char", "word"]
PieceKind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
RESERVED = tuple(f"<|reserved_{n}|>" for n in range(12))
MARKS = (SYSTEM, USER, ASSISTANT, END, *RESERVED)
CALL, TOOL = RESERVED[:2]  # by their old names, so that every tokenizer of ours has them
MAX_VOCAB_SIZE = 65_536  # token files hold uint16
MAX_BYTES = 2**25  # of a model's file; one of 65,536 pieces has about a million
SPACE_MARK = "\u2581"  # how SentencePiece writes a space; a text may hold it literally


def read_model(path: Path) -> bytes:
    """The bytes of a .model file, if it can be one."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name the .model file, or its folder")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MAX_BYTES:,}; it is no tokenizer")
    return path.read_bytes()


class Piece(NamedTuple):
    """What one id stands for, as SentencePiece keeps it."""

    text: str  # a space is U+2581; a byte is "<0x0A>"
    score: float
    kind: PieceKind


class Tokenizer:
    """Text to ids and back, by one SentencePiece model. Cheap to pickle: it travels as the model's bytes."""

    def __init__(self, serialized: bytes, name: str = "the tokenizer"):
        self.serialized = serialized
        self._words: WordSpeller | None = None
        self._asked_for_words = False
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.load_from_serialized_proto(serialized)  # the constructor would let no bytes at all pass
            self.pad_id, self.unk_id = int(self._sp.pad_id()), int(self._sp.unk_id())
            self.bos_id, self.eos_id = int(self._sp.bos_id()), int(self._sp.eos_id())
            self.vocab_size = int(self._sp.vocab_size())
            self._bytes = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
            self._byte_of = {token: byte for byte, token in enumerate(self._bytes)}
            self._space_mark = [self._bytes[byte] for byte in SPACE_MARK.encode()]
            # `word` models (and any without a piece for a space) spell an unknown " word" with its space mark in bytes.
            self._spells_spaces = self._bytes[0xE2] in self._sp.encode(" \u0378")
            self._check(name)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a SentencePiece model; make one with: nanollm tokenizer ...") from error

    def _check(self, name: str) -> None:
        marks = [self._sp.piece_to_id(mark) for mark in (SYSTEM, USER, ASSISTANT, END)]
        special = (self.pad_id, self.unk_id, self.bos_id, self.eos_id)  # -1: there is none
        probe = "  Two  spaces,\ttab\r\nNUL \0 \u2581 \u2585 \ufb01 \U0001f600 </s><|user|>\n "
        has_marks = min(special) >= 0 and all(map(self._sp.is_control, marks))
        has_bytes = len(self._byte_of) == 256 and all(map(self._sp.is_byte, self._bytes))
        if not has_marks or not has_bytes or self.decode(self.encode(probe)) != probe:
            raise ValueError(
                f"{name} is not a lossless tokenizer with chat marks (expected ids for pad, unk, bos, eos; "
                f"byte fallback; identity normalisation); make one with: nanollm tokenizer ..."
            )

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a .model file, or the only .model file of a folder."""
        path = Path(path)
        found = sorted(path.glob("*.model")) if path.is_dir() else [path] * path.exists()
        if not found:
            folder = path.parent if path.suffix == ".model" else path
            raise FileNotFoundError(
                f"no tokenizer at {path}; make one with: nanollm tokenizer --output_dir {folder} ..."
            )
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} must hold exactly one .model file, found {names}; name the file itself")
        return cls(read_model(found[0]), name=str(found[0]))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.serialized)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.serialized,)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the model's bytes: two tokenizers are the same exactly when these are."""
        return hashlib.sha256(self.serialized).hexdigest()

    @cached_property
    def pieces(self) -> list[Piece]:
        """What each id stands for."""
        kind_name = type(self._proto).SentencePiece.Type.Name
        return [Piece(piece.piece, piece.score, kind_name(piece.type).lower()) for piece in self._proto.pieces]

    @cached_property
    def model_type(self) -> ModelType:
        """How a text is cut into pieces."""
        spec = self._proto.trainer_spec
        name: ModelType = spec.ModelType.Name(spec.model_type).lower()
        return name

    @cached_property
    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2 as proto

        return proto.ModelProto.FromString(self.serialized)  # type: ignore[attr-defined]

    @cached_property
    def symbols(self) -> dict[int, str]:
        """The ids that stand for no text, the marks among them, and what they are called."""
        sp = self._sp
        none = (token for token in range(self.vocab_size) if sp.is_control(token) or sp.is_unknown(token))
        return {token: sp.id_to_piece(token) for token in none}

    def mark_id(self, mark: str) -> int:
        """The id of a control symbol, such as "<|user|>"."""
        token = self._sp.piece_to_id(mark)
        if not self._sp.is_control(token):
            raise ValueError(f"{mark!r} is not a mark of this tokenizer; its marks are {', '.join(MARKS)}")
        return int(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, never one of a control symbol, whatever the text spells.

        They are SentencePiece's own, but for a literal U+2581, which SentencePiece would read as a space:
        that character is spelled in bytes.
        """
        if self._words:
            ids: list[int] = self._words.spell([_utf8(text)])[0].tolist()
            return ids
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if not text.isascii():
            _utf8(text)
        if SPACE_MARK not in text:
            return self._encode_part(text)
        first, *others = map(self._encode_part, text.split(SPACE_MARK))
        return first + [token for ids in others for token in (*self._space_mark, *ids)]

    def _encode_part(self, text: str) -> list[int]:
        ids: list[int] = self._sp.encode(text)
        return self._spell_spaces(ids) if self._spells_spaces else ids

    def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the texts, int32, one after the other, and the number of each text's, int64."""
        if self._words:
            return self._words.spell([*map(_utf8, texts)])
        encoded = [self.encode(text) for text in texts]
        lengths = np.array([*map(len, encoded)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=lengths.sum()), lengths

    def remember_words(self) -> None:
        """Spell word by word from now on, and each word once: for long work, because it takes a moment to begin.

        The ids stay the same. Not every model can be used in this way (see text/words.py), and it takes a C++ compiler;
        nothing changes where that is missing.
        """
        if self._asked_for_words:
            return
        self._asked_for_words = True
        recipe = self._recipe()
        if recipe.is_cuttable and not self._spells_spaces:
            try:
                self._words = WordSpeller(recipe)
            except NoCompilerError as error:
                say(f"texts become ids several times as slowly: {error}")

    def _recipe(self) -> Recipe:
        """What the file says, where it says the same to SentencePiece; a damaged one may be read in two ways."""
        every = list(range(self.vocab_size))
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            recipe = Recipe.of(self.serialized)
            is_same = (recipe.pieces, recipe.scores) == (self._sp.id_to_piece(every), self._sp.get_score(every))
        except DecodeError:
            is_same = False
        if not is_same:
            raise ValueError("the tokenizer's file is damaged; copy it again")
        return recipe

    def _spell_spaces(self, ids: list[int]) -> list[int]:
        """Write the byte 0x20 for each space that SentencePiece spelled with the three bytes of its space mark."""
        spelled: list[int] = []
        for token in ids:
            spelled.append(token)
            if spelled[-3:] == self._space_mark:
                spelled[-3:] = [self._bytes[0x20]]
        return spelled

    def encode_document(self, text: str) -> list[int]:
        """<s> text </s>."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def decode_drawn(self, ids: Iterable[int]) -> str:
        """Text of ids that a model drew. It may have more ids than its tokenizer: those say nothing."""
        return self.decode(token for token in ids if token < self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Control symbols give nothing; bytes that are not UTF-8 give U+FFFD."""
        ids = [int(token) for token in ids]
        try:
            return str(self._sp.decode(ids))
        except IndexError as error:
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise ValueError(f"id {wrong} is outside this tokenizer's 0 to {self.vocab_size - 1}") from error

    def is_byte(self, token: int) -> bool:
        """Whether the id is a byte piece, which may be only a part of a character."""
        return token in self._byte_of

    def bytes_of(self, token: int) -> bytes:
        """What one drawn id stands for, in UTF-8. Control symbols and ids that the tokenizer lacks: nothing."""
        if token in self._byte_of:
            return bytes([self._byte_of[token]])
        return self.decode_drawn([token]).encode()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(V,) int32: how many UTF-8 bytes of text each id stands for; they sum to the bytes of any encoded text."""
        sp = self._sp
        pieces = [sp.id_to_piece(token).replace(SPACE_MARK, " ") for token in range(self.vocab_size)]
        sizes = np.array([len(piece.encode()) for piece in pieces], dtype=np.int32)
        sizes[self._bytes] = 1
        sizes[[*self.symbols]] = 0
        return sizes


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        position = error.start
        raise ValueError(
            f"character {position} of the text is the lone surrogate U+{ord(text[position]):04X}, which is not "
            f"valid Unicode; read the text again with its right encoding"
        ) from error
