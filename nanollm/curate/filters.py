"""What datatrove's filters need of us: words and sentences, and the search for questions of evaluations.

The filters follow Gopher (arXiv:2112.11446, appendix A) and C4 (arXiv:1910.10683), with words and sentences by two
regular expressions: datatrove's own way is spaCy, which takes several times as long; of 400 texts quality kept or
dropped 391 alike, and repetition 390. For English, as the rules are.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from nanollm.evals.contamination import QuestionIndex

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")  # marks are words of their own, as the rules count them
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|\Z)")


class RegexWords(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
    """Words and sentences of European languages, to datatrove's filters and MinHash."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [end.end() for end in SENTENCE_END.finditer(text)]
        spans = list(pairwise([0, *ends, len(text)]))
        return spans if text[spans[-1][0] :].strip() else spans[:-1]


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
        self.index: QuestionIndex | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self.index is None:  # here, in the task, so that it need not travel
            self.questions = json.loads(self.questions_file.read_bytes())
            self.index = QuestionIndex([question["text"] for question in self.questions])
        found = dict.fromkeys(self.index.found_in(doc.text), doc.id)
        if not found:
            return True
        doc.metadata["questions"] = [
            self.questions[overlap.question - 1] | {"share": overlap.share, "ngram": overlap.ngram}
            for overlap in self.index.overlaps(found)
        ]
        return False, "question"
