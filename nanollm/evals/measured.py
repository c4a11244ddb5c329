"""What is known of one bundle after an evaluation, what of two, and where does every reply go?"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanollm.bundle import Bundle
from nanollm.durable import write_file
from nanollm.evals import answers, documents, figures
from nanollm.evals.answers import Answers
from nanollm.evals.bits_per_byte import Documents
from nanollm.evals.figures import Figures
from nanollm.evals.problems import Judged


@dataclass(frozen=True)
class Bits:
    """Bits per byte of a text, and how long that took."""

    path: str
    documents: Documents
    seconds: float

    @classmethod
    def of_text(cls, path: Path, column: str, bundle: Bundle) -> "Bits":
        """Of files; `column` of their records is the text."""
        began = time.monotonic()
        texts = (text for _, text in documents.read_all(path, column, bundle.tokenizer))
        return cls(str(path), documents.bits_of_texts(bundle, texts), round(time.monotonic() - began, 3))

    @classmethod
    def of_prepared(cls, folder: Path, bundle: Bundle) -> "Bits":
        """Of the split val of token files."""
        began = time.monotonic()
        return cls(str(folder), documents.bits_of_prepared(bundle, folder), round(time.monotonic() - began, 3))

    @property
    def figures(self) -> Figures:
        return {"path": self.path} | figures.of_bits(self.documents) | {"seconds": self.seconds}


@dataclass(frozen=True)
class Measured:
    """What was found out about one bundle."""

    figures: Figures
    replies: dict[str, Judged]
    """To problems: greedy and samples, in the order of the problems."""
    answers: Answers | None
    """To tasks of lm-evaluation-harness."""
    bits: list[Bits]
    """Of texts."""

    def minus(self, other: "Measured") -> Figures:
        """This bundle compared with another, on the same problems and documents."""
        found: Figures = {}
        if self.replies:
            found["difference"] = figures.of_difference(self.replies["greedy"], other.replies["greedy"])
        pairs = [(mine, theirs) for mine in self.bits for theirs in other.bits if mine.path == theirs.path]
        if pairs:
            found["bits_difference"] = [
                figures.of_bits_difference(mine.path, mine.documents, theirs.documents) for mine, theirs in pairs
            ]
        if self.answers and other.answers:
            found["harness_difference"] = self.answers.minus(other.answers)
            found["suite_difference"] = self.answers.suites_minus(found["harness_difference"])
        return found


def save_replies(folder: Path, measured: Mapping[str, Measured]) -> None:
    """samples.jsonl, a line per problem, and harness-TASK.jsonl, a line per document.

    measured: "bundle" and perhaps "against".
    """
    replies = dict(measured["bundle"].replies)
    if replies and "against" in measured:
        replies["against"] = measured["against"].replies["greedy"]
    if replies:
        write_lines(folder / "samples.jsonl", figures.records(replies))
    answered = {name: each.answers for name, each in measured.items() if each.answers}
    for task in answered["bundle"].samples if answered else ():
        name = re.sub(r"[^\w.-]+", "-", task)
        write_lines(folder / f"harness-{name}.jsonl", answers.records(answered, task))


def write_lines(path: Path, records: Iterable[Figures]) -> None:
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
