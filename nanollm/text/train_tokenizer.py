"""Training a tokenizer on a corpus that need not fit into memory.

A uniform sample of the corpus, drawn while it is read once, goes line by line to SentencePiece's trainer, which is set
up so that nothing is lost (see text/tokenizer.py).

Layout of the ids: <pad> <unk> <s> </s>, 4 chat marks, 12 reserved marks, 256 bytes, then the learned pieces.
"""

import heapq
import io
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import get_args

import sentencepiece

from nanollm.kernels.build import NoCompilerError
from nanollm.progress import say
from nanollm.text.tokenizer import MARKS, MAX_VOCAB_SIZE, ModelType, Tokenizer
from nanollm.text.words import count_words

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
FIRST_LEARNED_ID = 4 + len(MARKS) + 256

CHARACTER_COVERAGE = 0.9995  # SentencePiece's default
MIN_COVERAGE = 0.98  # that SentencePiece takes
SAMPLE_BYTES = 100_000_000
PIECE_CHARS = 4096  # the unit of sampling; a longer document is cut into several
NUM_THREADS = 16  # written into the model, so a fixed number: its bytes must not depend on the cores

TAB = "\b"  # how a tab is written for the trainer, which separates words and counts with tabs
RESERVED_CHARS = f"\0\u2581\u2585{TAB}"  # SentencePiece skips a whole line for one of the first three
NOT_FOR_TRAINING = re.compile(f"[{RESERVED_CHARS}]+")
LINE = re.compile(r"[^\n]+\n*|\n+")

TAB_PIECE = b"\x0a\x08\x0a\x01" + TAB.encode() + b"\x15"  # the beginning of that piece in the file of a model

# What a piece may be part of: letters with the spaces or the one mark before them, as in `(foo` and `"The`, or marks
# with the spaces before them; digits and tabs alone. All outside ASCII counts as letters.
_LETTERS, _MARKS = "[A-Za-z\x80-\U0010ffff]", "[\x01-\x08\x0a-\x1f!-/:-@\\[-`{-\x7f]"
WORD = re.compile(f"[0-9\t]|{_MARKS}?{_LETTERS}+| +{_LETTERS}+| *{_MARKS}+| +")


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
    Training with vocab_size 50,304 then takes about 6 bytes of memory for each byte kept (bpe) or 22 (unigram):
    57 MB of English took 0.35 GB and 3 s of one core (bpe), 1.4 GB and 49 s of two (unigram).
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


def train_on(
    chosen: Sample,
    *,
    vocab_size: int,
    model_type: ModelType,
    character_coverage: float = CHARACTER_COVERAGE,
    num_threads: int = NUM_THREADS,
) -> Tokenizer:
    """Learn the pieces from a sample. The same sample and settings give the same bytes."""
    check_sizes(vocab_size, model_type)
    if not any(_lines(chosen.pieces)):
        raise ValueError("there is no text to train a tokenizer on; check that the corpus is not empty")
    pieces = chosen.pieces
    if character_coverage < MIN_COVERAGE:
        pieces, character_coverage = _without_rare(pieces, character_coverage), 1.0
    # Byte pair encoding looks at words and how often they come, so it gets just these: four times as fast.
    is_bpe = model_type == "bpe"
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_counts(pieces) if is_bpe else _lines(pieces),
            input_format="tsv" if is_bpe else "text",
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=num_threads,
            max_sentence_length=8 * PIECE_CHARS,  # bytes; above any line that `cut` leaves
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            split_by_unicode_script=not is_bpe,  # words are cut already
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
    written = model.getvalue()
    if is_bpe:
        assert written.count(TAB_PIECE) <= 1
        written = written.replace(TAB_PIECE, TAB_PIECE.replace(TAB.encode() + b"\x15", b"\t\x15"))
    return Tokenizer(written)


def _without_rare(pieces: list[bytes], coverage: float) -> list[bytes]:
    """The text cut at its rarest characters, so that the commonest, which make up this share of it, are left."""
    counts = Counter(chain.from_iterable(piece.decode() for piece in pieces))
    common = counts.most_common()
    sums = accumulate(count for _, count in common)
    kept = 1 + sum(total < coverage * counts.total() for total in sums)
    rare = re.compile("[" + "".join(re.escape(character) for character, _ in common[kept:]) + "]+")
    return (
        [part.encode() for piece in pieces for part in rare.split(piece.decode()) if part] if common[kept:] else pieces
    )


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


def _counts(pieces: list[bytes]) -> Iterator[str]:
    """The words of those lines, each once, with the number of times that it comes."""
    parts = [part for piece in pieces for part in _without_reserved(piece)]
    try:
        counts = count_words(parts)
    except NoCompilerError as error:
        say(f"words are counted slowly: {error}")
        counts = count_in_python(parts)
    counts[TAB.encode()] = counts.pop(b"\t", 0)
    for word, count in counts.items():
        if count:
            yield f"{word.decode()}\t{count}"


def _without_reserved(piece: bytes) -> list[bytes]:
    if not any(char.encode() in piece for char in RESERVED_CHARS):  # nearly always
        return [piece]
    return [part.encode() for part in NOT_FOR_TRAINING.split(piece.decode())]


def count_in_python(texts: Iterable[bytes]) -> dict[bytes, int]:
    """What words.count_words does, where it cannot be compiled."""
    counts: Counter[str] = Counter()
    for line in _lines(texts):
        counts.update(WORD.findall(line))
    return {word.encode(): count for word, count in counts.items()}


def _advice(error: str, vocab_size: int) -> str:
    """SentencePiece's complaint as one line that says what to do."""
    if largest := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        return (
            f"the text yields only {largest[1]} pieces, vocab_size is {vocab_size}; "
            f"give more text or --vocab_size {largest[1]} or less"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"the characters of the text need a vocab_size of at least {smallest[1]}, got {vocab_size}; give more, or "
            f"a smaller --character_coverage, which spells more of the rare ones in bytes"
        )
    return f"SentencePiece could not train: {' '.join(error.split())}"
