"""Which ids spell a text, and how are the pieces learned?

SentencePiece (arXiv:1808.06226), set up so that nothing is lost: `decode(encode(text)) == text` for every text that
is valid Unicode. Identity normalisation, no dummy prefix, no whitespace removal, digits one by one, and 256 byte
pieces for whatever has no piece of its own. The marks of a chat are *control* symbols: no text can spell one.

Layout of the ids when we train one: <pad> <unk> <s> </s>, 4 chat marks, 12 reserved marks, 256 bytes, then the learned
pieces. Another's may have another layout (export/adopt.py): ask the tokenizer for an id.
"""

import hashlib
import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import sentencepiece

from nanollm.durable import write_file

ModelType = Literal["bpe", "unigram", "char", "word"]
PieceKind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
RESERVED = tuple(f"<|reserved_{n}|>" for n in range(12))
MARKS = (SYSTEM, USER, ASSISTANT, END, *RESERVED)
FIRST_LEARNED_ID = 4 + len(MARKS) + 256
MAX_VOCAB_SIZE = 65_536  # token files hold uint16

SAMPLE_BYTES = 100_000_000
PIECE_CHARS = 4096  # the unit of sampling; a longer document is cut into several
NUM_THREADS = 16  # written into the model, so a fixed number: its bytes must not depend on the cores

SPACE_MARK = "\u2581"  # how SentencePiece writes a space; a text may hold it literally
NOT_FOR_TRAINING = re.compile("[\0\u2581\u2585]+")  # SentencePiece skips a whole line for one of these
LINE = re.compile(r"[^\n]+\n*|\n+")


class Piece(NamedTuple):
    """What one id stands for, as SentencePiece keeps it."""

    text: str  # a space is U+2581; a byte is "<0x0A>"
    score: float
    kind: PieceKind


class Tokenizer:
    """Text to ids and back, by one SentencePiece model. Cheap to pickle: it travels as the model's bytes."""

    def __init__(self, serialized: bytes, name: str = "the tokenizer"):
        self.serialized = serialized
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.load_from_serialized_proto(serialized)  # the constructor would let no bytes at all pass
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
        if not has_marks or self.decode(self.encode(probe)) != probe:
            raise ValueError(
                f"{name} is not a lossless tokenizer with chat marks (expected ids for pad, unk, bos, eos; "
                f"byte fallback; identity normalisation); make one with: nanollm tokenizer ..."
            )

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a .model file, or the only .model file of a folder."""
        path = Path(path)
        if path.is_dir():
            found = sorted(path.glob("*.model"))
            if len(found) != 1:
                if not found:
                    raise FileNotFoundError(
                        f"no tokenizer in {path}; make one with: nanollm tokenizer --output_dir {path} ..."
                    )
                names = ", ".join(file.name for file in found)
                raise ValueError(f"{path} must hold exactly one .model file, found {names}; name the file itself")
            path = found[0]
        if not path.exists():
            raise FileNotFoundError(
                f"no tokenizer at {path}; make one with: nanollm tokenizer --output_dir {path.parent} ..."
            )
        return cls(path.read_bytes(), name=str(path))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.serialized)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.serialized,)

    @property
    def pad_id(self) -> int:
        return int(self._sp.pad_id())

    @property
    def unk_id(self) -> int:
        return int(self._sp.unk_id())

    @property
    def bos_id(self) -> int:
        return int(self._sp.bos_id())

    @property
    def eos_id(self) -> int:
        return int(self._sp.eos_id())

    @property
    def vocab_size(self) -> int:
        return int(self._sp.vocab_size())

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
        from sentencepiece import sentencepiece_model_pb2 as proto  # needs protobuf, which comes with nanollm[export]

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
        if SPACE_MARK not in text:
            return self._encode(text)
        first, *others = map(self._encode, text.split(SPACE_MARK))
        return first + [token for ids in others for token in (*self._space_mark, *ids)]

    def _encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._sp.encode(text)
        except RuntimeError as error:
            position = next((at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if position is None:
                raise
            raise ValueError(
                f"character {position} of the text is the lone surrogate U+{ord(text[position]):04X}, which is not "
                f"valid Unicode; read the text again with its right encoding"
            ) from error
        return self._spell_spaces(ids) if self._spells_spaces else ids

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


@dataclass(frozen=True)
class Sample:
    """A uniform part of a corpus, small enough to learn pieces from."""

    pieces: list[bytes]  # UTF-8, in the order of the corpus
    bytes_seen: int

    @property
    def bytes_kept(self) -> int:
        return sum(map(len, self.pieces))


def cut(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a text into parts of at most `limit` characters: after a newline, else before a space, else anywhere.

    No character is lost: the parts joined are the text.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or text.rfind(" ", start + 1, start + limit)
        end = end if end > start else start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def sample(texts: Iterable[str], budget: int = SAMPLE_BYTES, seed: int = 0) -> Sample:
    """Keep a uniform random part of the texts, at most `budget` bytes, reading them once and holding only that part.

    Each piece of text draws a number; those below the threshold stay, and the threshold falls as the budget fills.
    Training with vocab_size 50,304 then takes about 10 bytes of memory for each byte kept (bpe) or 22 (unigram):
    57 MB of English took 0.75 GB and 8 s (bpe), 1.4 GB and 49 s (unigram) on two cores.
    """
    draw = random.Random(seed).random
    threshold, kept_bytes, seen_bytes = 1.0, 0, 0
    kept: list[tuple[float, int, bytes]] = []  # a heap with the largest number first
    for index, piece in enumerate(part for text in texts for part in cut(text)):
        encoded, number = piece.encode(), draw()
        seen_bytes += len(encoded)
        if number >= threshold:
            continue
        heapq.heappush(kept, (-number, index, encoded))
        kept_bytes += len(encoded)
        while kept_bytes > budget and len(kept) > 1:
            number, _, dropped = heapq.heappop(kept)
            threshold = -number
            kept_bytes -= len(dropped)
    return Sample([piece for _, _, piece in sorted(kept, key=lambda entry: entry[1])], seen_bytes)


def train(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    model_type: ModelType = "bpe",
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
    num_threads: int = NUM_THREADS,
) -> Tokenizer:
    """Learn the pieces of a tokenizer from (a uniform sample of) texts and write the model to `path`."""
    check_sizes(vocab_size, model_type)
    chosen = sample(texts, sample_bytes, seed)
    tokenizer = train_on(chosen, vocab_size=vocab_size, model_type=model_type, num_threads=num_threads)
    tokenizer.save(path)
    return tokenizer


def train_on(chosen: Sample, *, vocab_size: int, model_type: ModelType, num_threads: int = NUM_THREADS) -> Tokenizer:
    """Learn the pieces from a sample. The same sample and settings give the same bytes."""
    check_sizes(vocab_size, model_type)
    if not any(_lines(chosen.pieces)):
        raise ValueError("there is no text to train a tokenizer on; check that the corpus is not empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(chosen.pieces),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            num_threads=num_threads,
            max_sentence_length=8 * PIECE_CHARS,  # bytes; above any line that `cut` leaves
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            unk_surface="",
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            control_symbols=list(MARKS),
            minloglevel=2,  # errors come as exceptions
        )
    except RuntimeError as error:
        raise ValueError(_advice(str(error), vocab_size)) from error
    return Tokenizer(model.getvalue())


def check_sizes(vocab_size: int, model_type: str) -> None:
    if model_type not in get_args(ModelType):
        raise ValueError(f"model_type must be one of {', '.join(get_args(ModelType))}, got {model_type!r}")
    if not FIRST_LEARNED_ID < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be from {FIRST_LEARNED_ID + 1} ({FIRST_LEARNED_ID} marks and bytes come first) "
            f"to {MAX_VOCAB_SIZE:,} (token files hold uint16), got {vocab_size}"
        )


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """The lines to learn from: line by line, so that "end\\nStart" is not a word, each with its newlines.

    A space goes last because SentencePiece strips a newline there; a space before nothing teaches nothing.
    """
    for piece in pieces:
        for part in NOT_FOR_TRAINING.split(piece.decode()):
            for line in LINE.findall(part):
                yield line + " "


def _advice(error: str, vocab_size: int) -> str:
    """SentencePiece's complaint as one line that says what to do."""
    if largest := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        return (
            f"the text yields only {largest[1]} pieces, vocab_size is {vocab_size}; "
            f"give more text or --vocab_size {largest[1]} or less"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"the characters of the text need a vocab_size of at least {smallest[1]}, got {vocab_size}"
    return f"SentencePiece could not train: {' '.join(error.split())}"
