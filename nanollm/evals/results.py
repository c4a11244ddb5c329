"""Turns what was measured into figures for eval.json, replies for samples.jsonl, and lines for people."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from nanollm.durable import write_file
from nanollm.evals.bits_per_byte import Documents
from nanollm.evals.contamination import Contamination
from nanollm.evals.problems import Accuracy, Judged, majority
from nanollm.evals.stats import Figures, Mean, apart, paired, pass_at_k
from nanollm.report import tables

if TYPE_CHECKING:
    from nanollm.evals.benchmarks import Answers  # needs the extra [eval], and seconds

# --- measured ---


@dataclass(frozen=True)
class Measured:
    """All results of one bundle."""

    figures: Figures
    replies: dict[str, Judged]
    """To problems: greedy and samples, in the order of the problems."""
    answers: "Answers | None"
    """To tasks of lm-evaluation-harness."""
    bits: dict[str, Documents]
    """Of texts, by their paths."""

    def minus(self, other: "Measured") -> Figures:
        """This bundle compared with another, on the same problems and documents."""
        found: Figures = {}
        if self.replies:
            found["difference"] = difference(self.replies["greedy"], other.replies["greedy"])
        ratios = {path: mine.minus(other.bits[path]) for path, mine in self.bits.items() if path in other.bits}
        if ratios:
            found["bits_difference"] = [
                {"path": path, "difference": each.value, "low": each.low, "high": each.high}
                | {"n": len(self.bits[path].bytes)}
                for path, each in ratios.items()
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
        write_lines(folder / "samples.jsonl", records(replies))
    if answered := [each.answers for each in measured.values() if each.answers]:
        first, *others = answered
        for task in first.samples:
            name = re.sub(r"[^\w.-]+", "-", task)
            write_lines(folder / f"harness-{name}.jsonl", first.records(task, [*measured], *others))


def records(replies: Mapping[str, Judged]) -> Iterator[Figures]:
    """One per problem: question, gold answer, and under each name the replies with the graders' verdicts.

    Everyone in `replies`, at least one, has tried the same problems.
    """
    for place, attempt in enumerate(next(iter(replies.values())).attempts):
        record: Figures = {"question": attempt.problem.question, "gold": attempt.problem.answer}
        for name, judged in replies.items():
            its = judged.attempts[place]
            verdicts = {grader: of_problems[place] for grader, of_problems in judged.verdicts.items()}
            record[name] = {"replies": its.replies, "finish": its.finish, "tokens": its.tokens, "verdicts": verdicts}
        yield record


def write_lines(path: Path, lines: Iterable[Figures]) -> None:
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


# --- eval.json ---


def greedy_figures(judged: Judged) -> Figures:
    """The first reply to each problem, by grader."""
    return {"scores": {name: share(judged.first(name)) for name in judged.verdicts}} | reply_figures(judged)


def sample_figures(judged: Judged, samples: int, tries: Sequence[int]) -> Figures:
    """pass@k of all replies, by grader, and maj@k of all of them where answers can vote."""
    scores: Figures = {}
    for name, verdicts in judged.verdicts.items():
        counts = [sum(of_problem) for of_problem in verdicts]
        scores[name] = {f"pass@{k}": asdict(pass_at_k(counts, samples, k)) | {"n": len(counts)} for k in tries}
        if (solved := majority(judged, name)) is not None:
            scores[name][f"maj@{samples}"] = share(solved)
    return {"scores": scores} | reply_figures(judged)


def bits_figures(path: str, found: Documents) -> Figures:
    """Bits per byte over n documents."""
    ratio, total = found.ratio, asdict(found.total)
    interval = {"bits_per_byte": ratio.value, "low": ratio.low, "high": ratio.high}
    return {"path": path} | interval | {"n": len(found.bytes)} | total


def share(verdicts: Sequence[bool]) -> Figures:
    accuracy = Accuracy.of(verdicts)
    return {"value": accuracy.value} | asdict(accuracy)


def reply_figures(judged: Judged) -> Figures:
    """How the replies ended, how long they are on average, and how many questions left no room for one."""
    finish = [each for attempt in judged.attempts for each in attempt.finish]
    return {
        "ended": fmean(each == "end" for each in finish),
        "mean_tokens": fmean(tokens for attempt in judged.attempts for tokens in attempt.tokens),
        "no_room": sum(attempt.finish[0] == "no room" for attempt in judged.attempts),
        "grader_faults": judged.faults,
    }


def difference(first: Judged, second: Judged) -> Figures:
    """By grader, first minus second on the same problems."""
    pairs = {name: paired(first.first(name), second.first(name)) for name in first.verdicts}
    return {name: {"difference": pair.difference} | asdict(pair) for name, pair in pairs.items()}


def contamination_figures(found: Contamination, judged: Judged) -> Figures:
    """The overlaps, the scores on the questions without and with one, and how far they lie apart."""
    copied = {overlap.question - 1 for overlap in found.overlaps}
    figures: Figures = {"clean_scores": {}, "copied_scores": {}, "copied_minus_clean": {}}
    for name in judged.verdicts:
        parts: dict[str, list[bool]] = {"clean_scores": [], "copied_scores": []}
        for place, right in enumerate(judged.first(name)):
            parts["copied_scores" if place in copied else "clean_scores"].append(right)
        scores = {part: share(verdicts) for part, verdicts in parts.items() if verdicts}
        for part, score in scores.items():
            figures[part][name] = score
        if len(scores) == 2:
            clean, dirty = (Mean(each["value"], each["low"], each["high"]) for each in scores.values())
            mean = apart(dirty, clean)
            figures["copied_minus_clean"][name] = {"difference": mean.value, "low": mean.low, "high": mean.high}
    return asdict(found) | figures


# --- lines for people ---


def lines(evaluation: Figures) -> list[str]:
    """One line per figure of an eval.json; the model's name only where two were measured."""
    of_two = "against" in evaluation
    found = []
    for model, what, score, n in tables.scores_of(evaluation):
        found.append(f"{model}, {what}: {score}, n {n:,}" if of_two else f"{what}: {score}, n {n:,}")
    for measured in (evaluation[side] for side in ("bundle", "against") if side in evaluation):
        if "greedy" in measured:
            found.append((f"{measured['path']}, " if of_two else "") + _replies(measured["greedy"]))
    for what, difference, p in tables.differences_of(evaluation):
        found.append(f"{what}: {difference}" + ("" if p is None else f", p {p:.2g}"))
    return [*found, *tables.notes_of(evaluation)]


def _replies(figures: Figures) -> str:
    parts = [f"replies: {100 * figures['ended']:.1f} % ended by the model", f"{figures['mean_tokens']:.1f} tokens each"]
    if figures["no_room"]:
        parts.append(f"{figures['no_room']:,} questions did not fit the context and count as wrong")
    if figures["grader_faults"]:
        parts.append(f"the grader failed on {figures['grader_faults']:,}, which count as wrong")
    return ", ".join(parts)
