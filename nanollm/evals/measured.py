"""What is known of one bundle after an evaluation, what of two, and where does every reply go?"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanollm.durable import write_file
from nanollm.evals import answers, figures
from nanollm.evals.answers import Answers
from nanollm.evals.figures import Figures
from nanollm.evals.problems import Judged


@dataclass(frozen=True)
class Measured:
    """What was found out about one bundle."""

    figures: Figures
    replies: dict[str, Judged]
    """To problems: greedy and samples, in the order of the problems."""
    answers: Answers | None
    """To tasks of lm-evaluation-harness."""

    def minus(self, other: "Measured") -> Figures:
        """This bundle compared with another, on the same problems and documents."""
        found: Figures = {}
        if self.replies:
            found["difference"] = figures.of_difference(self.replies["greedy"], other.replies["greedy"])
        if self.answers and other.answers:
            found["harness_difference"] = self.answers.minus(other.answers)
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
