"""Filters of datatrove for documents of the web that are not worth training on, or hold a question of an evaluation.

They follow Gopher (arXiv:2112.11446, appendix A) and C4 (arXiv:1910.10683), with words and sentences by two
regular expressions: datatrove's own way is spaCy, which takes several times as long; of 400 texts quality kept or
dropped 391 alike, and repetition 390. For English, as the rules are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import CITATION_REGEX, C4QualityFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from nanollm.evals.contamination import NGRAM_WORDS, Finder

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")  # marks are words of their own, as the rules count them
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|\Z)")

LANGUAGE_SCORE = 0.65  # the least probability of a language that is kept


class RegexWords(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
    """Words and sentences of European languages, to datatrove's filters and MinHash."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return list(_sentences(text))


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for end in SENTENCE_END.finditer(text):
        yield start, end.end()
        start = end.end()
    if text[start:].strip():
        yield start, len(text)


class C4Quality(C4QualityFilter):  # type: ignore[misc]
    """C4's rules as FineWeb takes them: a line may end without a mark. The one filter that changes documents.

    Lines that it takes out of a document that stays are listed; blank lines and notes such as [1] go unlisted.
    """

    def __init__(self, words: RegexWords, removed: Any, lines: Any) -> None:
        """removed, lines: writers of datatrove's, for documents and for lines."""
        super().__init__(removed, filter_no_terminal_punct=False, language=words)
        self.lines = lines

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self.lines:
            for document in super().run(data, rank, world_size):
                if gone := document.metadata.pop("lines", None):
                    self.lines.write(Document(text="\n".join(gone), id=document.id), rank)
                yield document

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        before = [CITATION_REGEX.sub("", line.strip()) for line in doc.text.splitlines()]
        found: bool | tuple[bool, str] = super().filter(doc)
        if found is True:
            doc.metadata["lines"] = _gone(before, doc.text.split("\n"))
        return found


def _gone(before: list[str], after: list[str]) -> list[str]:
    """The lines that are not there any more, blank ones apart."""
    stays, gone = Counter(after), []
    for line in before:
        if stays[line]:
            stays[line] -= 1
        elif line:
            gone.append(line)
    return gone


class InLanguage(BaseFilter):  # type: ignore[misc]
    """Keep what a fastText model takes for a language."""

    name = "language"

    def __init__(self, language: str, model: Path, removed: Any) -> None:
        """model: such as lid.176.bin, with labels like __label__en; removed: a writer of datatrove's."""
        super().__init__(removed)
        self.language, self.model_file = language, model
        self.model: Any = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self.model is None:  # here, in the task: it cannot travel
            self.model = import_module("fasttext").load_model(str(self.model_file))
        labels, scores = self.model.predict(" ".join(doc.text.split()), k=-1)
        found = dict(zip(labels, scores, strict=True)).get(f"__label__{self.language}", 0.0)
        doc.metadata["score"] = float(found)
        return bool(found >= LANGUAGE_SCORE) or (False, "language")


class DropContaminated(BaseFilter):  # type: ignore[misc]
    """Leave out the documents that have 13 words in a row in common with a question.

    Their metadata then lists the questions, how much of each was found, and the first n-gram of each.
    """

    name = "contaminated"

    def __init__(self, questions: Path, removed: Any) -> None:
        """questions: a JSON list of {"where": ..., "text": ...}; removed: a writer of datatrove's."""
        super().__init__(removed)
        self.questions_file = questions
        self.questions: list[dict[str, str]] = []
        self.finder: Finder | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self.finder is None:  # here, in the task, so that it need not travel
            self.questions = json.loads(self.questions_file.read_bytes())
            self.finder = Finder([question["text"] for question in self.questions], NGRAM_WORDS)
        found = self.finder.overlaps(doc.id, doc.text)
        if not found:
            return True
        doc.metadata["questions"] = [
            self.questions[overlap.question - 1] | {"share": overlap.share, "ngram": overlap.ngram} for overlap in found
        ]
        return False, "question"
