"""A block of datatrove that drops documents with a part of an evaluation's question.

It uses the search of contamination.py: a document with one n-gram of a question is left out as a whole. Its metadata
then lists the questions, how much of each was found, and the first n-gram of each.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from nanollm.evals.contamination import Finder


@dataclass(frozen=True)
class Question:
    """A question that no training text may hold."""

    where: str
    """File and number, from 1."""
    text: str


def to_json(questions: Sequence[Question]) -> list[dict[str, str]]:
    """Questions as a file holds them, from which tasks on other machines read them."""
    return [asdict(question) for question in questions]


class DropContaminated(BaseFilter):  # type: ignore[misc]  # datatrove has no types
    """Leave out the documents that have n words in a row in common with a question."""

    name = "contaminated"

    def __init__(self, questions: Path, n: int, removed: Any) -> None:
        """questions: a file with what to_json gives; removed: a writer of datatrove's."""
        super().__init__(removed)
        self.questions_file, self.n = questions, n
        self.questions: list[Question] = []
        self.finder: Finder | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self.finder is None:  # here, in the task, so that it need not travel
            self.questions = [Question(**each) for each in json.loads(self.questions_file.read_bytes())]
            self.finder = Finder([question.text for question in self.questions], self.n)
        found = self.finder.overlaps(doc.id, doc.text)
        if not found:
            return True
        doc.metadata["questions"] = [
            asdict(self.questions[overlap.question - 1]) | {"share": overlap.share, "ngram": overlap.ngram}
            for overlap in found
        ]
        return False, "question"
