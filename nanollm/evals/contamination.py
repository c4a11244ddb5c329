"""Test questions that stand, in whole or in part, in the text that a model was trained on.

Source: GPT-3, arXiv:2005.14165, appendix C: a question that has any n-gram of words in common with a training document
is dirty; n is 13 at most, and 8 at least, because shorter ones meet by chance. A word is a run of letters and digits
in lower case, so that case, punctuation and spacing hide nothing. A question of fewer than n words is one n-gram, all
of it; below 8 words (below n, if that is less) it is not searched for, and counted as such.
Letters: W words of some training text, n words of an n-gram.

Only the questions' n-grams are held, the training text streams by. Its words become numbers (0: in no question), the
numbers become a hash per place, and where that hash is one of ours the words themselves are compared: no false hits.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

from nanollm.text.train_tokenizer import cut

NGRAM_WORDS = 13
FEWEST_WORDS = 8
WORD = re.compile(r"[^\W_]+")
PIECE_CHARS = 2**20  # of a long document at once, which bounds the memory
BATCH_WORDS = 2**17  # short documents are looked at together, which is faster

Numbers = npt.NDArray[np.uint64]  # of words; 64 bits because they are hashed
Ngram = tuple[int, ...]


@dataclass(frozen=True)
class Overlap:
    """A question that has n-grams in common with the training text."""

    question: int
    """Its number among the questions, from 1."""
    share: float
    """Of its n-grams, how many were found."""
    ngram: str
    """The first of them that was, in lower case and without punctuation."""
    where: str
    """The first document that has it."""


@dataclass(frozen=True)
class Contamination:
    """What a search found."""

    n: int
    questions: int
    unsearched: int
    """Questions of too few words to tell a copy from chance."""
    documents: int
    text_bytes: int
    """Of the training text."""
    overlaps: list[Overlap]
    """Questions with any hit, the largest share first."""


def search(questions: Sequence[str], documents: Iterable[tuple[str, str]], n: int = NGRAM_WORDS) -> Contamination:
    """Look for the n-grams of questions in documents, pairs of (where it stands, its text), each read once."""
    if n < 1 or not questions:
        raise ValueError(f"a search needs n of at least 1 and at least one question, got {n} and {len(questions)}")
    index = _Index(questions, n)
    read = text_bytes = waiting = 0
    batch: list[tuple[str, Numbers]] = []
    for where, text in documents:
        read += 1
        text_bytes += len(text.encode())
        batch.append((where, index.numbers_of(text)))
        waiting += len(batch[-1][1])
        if waiting >= BATCH_WORDS:
            index.look(batch)
            batch, waiting = [], 0
    index.look(batch)
    return Contamination(n, len(questions), index.ngrams.count([]), read, text_bytes, list(index.overlaps()))


class Finder:
    """The same search in one document after the other, for those who leave out what has a hit."""

    def __init__(self, questions: Sequence[str], n: int = NGRAM_WORDS) -> None:
        self._index = _Index(questions, n)

    def overlaps(self, where: str, text: str) -> list[Overlap]:
        """The questions that have n-grams in common with this document, the largest share first."""
        self._index.where = {}
        self._index.look([(where, self._index.numbers_of(text))])
        return list(self._index.overlaps()) if self._index.where else []


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return WORD.findall(text.lower())


class _Index:
    """The n-grams of questions, and where each was met first."""

    def __init__(self, questions: Sequence[str], n: int) -> None:
        self.vocabulary: dict[str, int] = {}
        self.ngrams = [self._ngrams_of(words_of(question), n) for question in questions]
        self.where: dict[Ngram, str] = {}
        # One odd factor per place: unequal n-grams have equal hashes about once in 2**63.
        self.factors = np.random.default_rng(0).integers(2**63, size=n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.wanted = {ngram for ngrams in self.ngrams for ngram in ngrams}
        self.hashes: dict[int, Numbers] = {}  # of the wanted n-grams, by their length; sorted
        for length in {len(ngram) for ngram in self.wanted}:
            rows = np.array([ngram for ngram in self.wanted if len(ngram) == length], np.uint64)
            self.hashes[length] = np.unique((rows * self.factors[:length]).sum(axis=1, dtype=np.uint64))

    def _ngrams_of(self, words: list[str], n: int) -> list[Ngram]:
        """Each n-gram of a question once, in order."""
        length = min(n, len(words))
        if length < min(n, FEWEST_WORDS):
            return []
        numbers = [self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in words]
        return list(dict.fromkeys(tuple(numbers[at : at + length]) for at in range(len(words) - length + 1)))

    def numbers_of(self, text: str) -> Numbers:
        """(W,): the number of each word, 0 for one that is in no question."""
        pieces = [words_of(piece) for piece in cut(text, PIECE_CHARS)]
        numbers = [np.fromiter(map(self.vocabulary.get, words, repeat(0)), np.uint64, len(words)) for words in pieces]
        return numbers[0] if len(numbers) == 1 else np.concatenate([*numbers, np.empty(0, np.uint64)])

    def _hash_at_each_place(self, numbers: Numbers, length: int) -> Numbers:
        """(W,) to (W - length + 1,): a hash of the `length` words from there on; uint64 wraps around."""
        places = len(numbers) - length + 1
        total = np.zeros(places, np.uint64)
        for offset, factor in enumerate(self.factors[:length]):
            total += numbers[offset : offset + places] * factor
        return total

    def look(self, batch: Sequence[tuple[str, Numbers]]) -> None:
        """Note which n-grams stand in these documents."""
        if not batch:
            return
        # A 0 behind each document: no n-gram reaches over its end.
        numbers = np.concatenate([part for _, document in batch for part in (document, np.zeros(1, np.uint64))])
        ends = np.cumsum([len(document) + 1 for _, document in batch])
        unknown = np.concatenate([[0], np.cumsum(numbers == 0)])  # before each place
        for length, hashes in self.hashes.items():
            if length > len(numbers):
                continue
            places = np.flatnonzero(unknown[length:] == unknown[:-length])  # W - length + 1 of them are looked at
            found = self._hash_at_each_place(numbers, length)[places]
            is_ours = hashes[np.minimum(hashes.searchsorted(found), len(hashes) - 1)] == found
            for place in places[is_ours].tolist():
                ngram = tuple(numbers[place : place + length].tolist())
                if ngram in self.wanted and ngram not in self.where:
                    self.where[ngram] = batch[int(ends.searchsorted(place, side="right"))][0]

    def overlaps(self) -> Iterator[Overlap]:
        words = ["", *self.vocabulary]
        found = [[ngram for ngram in ngrams if ngram in self.where] for ngrams in self.ngrams]
        shares = [len(some) / len(every) if some else 0.0 for some, every in zip(found, self.ngrams, strict=True)]
        for question in sorted(range(len(found)), key=lambda place: (-shares[place], place)):
            if found[question]:
                first = found[question][0]
                text = " ".join(words[number] for number in first)
                yield Overlap(question + 1, shares[question], text, self.where[first])
