"""Finds test questions that stand, in whole or in part, in the text that a model was trained on.

Source: GPT-3, arXiv:2005.14165, appendix C: a question that has any n-gram of words in common with a training document
is dirty; n is 13 at most, and 8 at least, because shorter ones meet by chance. A word is a run of letters and digits
in lower case, so that case, punctuation and spacing hide nothing. A question of fewer than n words is one n-gram, all
of it; below 8 words (below n, if that is less) it is not searched for, and counted as such.

Only the questions' n-grams are held, the training text streams by.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nanollm.text.train_tokenizer import cut

NGRAM_WORDS = 13
MIN_WORDS = 8
WORD = re.compile(r"[^\W_]+")
PIECE_CHARS = 2**20  # of a long document at once, which bounds the memory

Ngram = tuple[str, ...]


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
    index = QuestionIndex(questions, n)
    read = text_bytes = 0
    where: dict[Ngram, str] = {}
    for name, text in documents:
        read += 1
        text_bytes += len(text.encode())
        for ngram in index.found_in(text):
            where.setdefault(ngram, name)
    return Contamination(n, len(questions), index.ngrams.count([]), read, text_bytes, index.overlaps(where))


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return WORD.findall(text.lower())


class QuestionIndex:
    """The n-grams of questions."""

    def __init__(self, questions: Sequence[str], n: int = NGRAM_WORDS) -> None:
        self.n = n
        self.ngrams = [self._ngrams_of(words_of(question)) for question in questions]
        self.wanted = {ngram for ngrams in self.ngrams for ngram in ngrams}
        self.lengths = sorted({len(ngram) for ngram in self.wanted})
        self.vocabulary = {word for ngram in self.wanted for word in ngram}

    def _ngrams_of(self, words: list[str]) -> list[Ngram]:
        """Each n-gram of a question once, in order."""
        length = min(self.n, len(words))
        if length < min(self.n, MIN_WORDS):
            return []
        return list(dict.fromkeys(tuple(words[at : at + length]) for at in range(len(words) - length + 1)))

    def found_in(self, text: str) -> Iterator[Ngram]:
        """The wanted n-grams that stand in a text, in order."""
        before: deque[str] = deque(maxlen=self.n)  # the last words, all of which stand in questions
        for piece in cut(text, PIECE_CHARS):
            for word in words_of(piece):
                if word not in self.vocabulary:
                    before.clear()
                    continue
                before.append(word)
                for length in self.lengths:
                    if length <= len(before) and (ngram := tuple(before)[-length:]) in self.wanted:
                        yield ngram

    def overlaps(self, where: Mapping[Ngram, str]) -> list[Overlap]:
        """The questions of which n-grams were found, and where; the largest share first."""
        overlaps = []
        for number, ngrams in enumerate(self.ngrams, start=1):
            if found := [ngram for ngram in ngrams if ngram in where]:
                overlaps.append(Overlap(number, len(found) / len(ngrams), " ".join(found[0]), where[found[0]]))
        return sorted(overlaps, key=lambda overlap: -overlap.share)
