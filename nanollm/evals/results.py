"""Turns what was measured into figures for eval.json, replies for samples.jsonl, and lines for people."""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanollm.bundle import Bundle
from nanollm.durable import write_file
from nanollm.evals import documents
from nanollm.evals.bits_per_byte import Documents
from nanollm.evals.contamination import Contamination
from nanollm.evals.problems import Accuracy, Judged, majority
from nanollm.evals.stats import Figures, Mean, apart, paired, pass_at_k

if TYPE_CHECKING:
    from nanollm.evals.benchmarks import Answers  # needs the extra [eval], and seconds

MAX_SHOWN = 3  # questions that stand in the training text


# --- measured ---


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
        """Bits per byte over n documents."""
        ratio, total = self.documents.ratio, asdict(self.documents.total)
        interval = {"bits_per_byte": ratio.value, "low": ratio.low, "high": ratio.high}
        return {"path": self.path} | interval | {"n": len(self.documents.bytes)} | total | {"seconds": self.seconds}

    def minus(self, other: "Bits") -> Figures:
        """First minus second on the same n documents."""
        ratio = self.documents.minus(other.documents)
        interval = {"difference": ratio.value, "low": ratio.low, "high": ratio.high}
        return {"path": self.path} | interval | {"n": len(self.documents.bytes)}


@dataclass(frozen=True)
class Measured:
    """All results of one bundle."""

    figures: Figures
    replies: dict[str, Judged]
    """To problems: greedy and samples, in the order of the problems."""
    answers: "Answers | None"
    """To tasks of lm-evaluation-harness."""
    bits: list[Bits]
    """Of texts."""

    def minus(self, other: "Measured") -> Figures:
        """This bundle compared with another, on the same problems and documents."""
        found: Figures = {}
        if self.replies:
            found["difference"] = difference(self.replies["greedy"], other.replies["greedy"])
        pairs = [(mine, theirs) for mine in self.bits for theirs in other.bits if mine.path == theirs.path]
        if pairs:
            found["bits_difference"] = [mine.minus(theirs) for mine, theirs in pairs]
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


def share(verdicts: Sequence[bool]) -> Figures:
    accuracy = Accuracy.of(verdicts)
    return {"value": accuracy.value} | asdict(accuracy)


def reply_figures(judged: Judged) -> Figures:
    return {
        "ended": judged.ended,
        "mean_tokens": judged.mean_tokens,
        "no_room": judged.no_room,
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


def lines(figures: Figures) -> list[str]:
    """One line per figure of an eval.json."""
    settings, bundle, other = figures["settings"], figures["bundle"], figures.get("against", {})
    task = f"{settings['task']['name']} {settings['task']['split']}"
    found = []
    if "greedy" in bundle:
        found += [f"{task}, greedy: {_scores(bundle['greedy']['scores'])}", _replies(bundle["greedy"])]
    if "samples" in bundle:
        what = f"{task}, {settings['samples']} samples at temperature {settings['temperature']:g}"
        found += _pass_lines(what, bundle["samples"]["scores"])
    if "greedy" in other:
        found += [f"{other['path']}, greedy: {_scores(other['greedy']['scores'])}", _replies(other["greedy"])]
        found += [f"{bundle['path']} minus {other['path']}: {_differences(figures['difference'])}"]
    found += _bits_lines(figures)
    if "harness" in bundle:
        found += _harness_lines(figures)
    if "contamination" in figures:
        found += _contamination_lines(figures["contamination"])
    return found


def _scores(scores: Figures) -> str:
    parts = [
        f"{100 * each['value']:.1f} % {name} ({100 * each['low']:.1f} to {100 * each['high']:.1f})"
        for name, each in scores.items()
    ]
    return ", ".join([*parts, f"n {next(iter(scores.values()))['n']:,}"])


def _replies(figures: Figures) -> str:
    parts = [f"replies: {100 * figures['ended']:.1f} % ended by the model", f"{figures['mean_tokens']:.1f} tokens each"]
    if figures["no_room"]:
        parts.append(f"{figures['no_room']:,} questions did not fit the context and count as wrong")
    if figures["grader_faults"]:
        parts.append(f"the grader failed on {figures['grader_faults']:,}, which count as wrong")
    return ", ".join(parts)


def _pass_lines(what: str, scores: Figures) -> list[str]:
    tries = dict.fromkeys(k for of_grader in scores.values() for k in of_grader)
    by_tries = {k: {name: each[k] for name, each in scores.items() if k in each} for k in tries}
    return [f"{what}, {k}: {_scores(of_k)}" for k, of_k in by_tries.items()]


def _differences(differences: Figures) -> str:
    return "; ".join(
        f"{100 * each['difference']:+.1f} points {name} ({100 * each['low']:+.1f} to {100 * each['high']:+.1f})"
        + (f", p {each['p']:.2g}" if "p" in each else "")
        for name, each in differences.items()
    )


def _bits_lines(figures: Figures) -> list[str]:
    bundle, other = figures["bundle"], figures.get("against", {})
    others = {each["path"]: each for each in [*other.get("text", []), *other.get("data", [])]}
    differences = {each["path"]: each for each in figures.get("bits_difference", [])}
    found = []
    for each in [*bundle.get("text", []), *bundle.get("data", [])]:
        path = each["path"]
        line = f"{path}: {each['bits_per_byte']:.4f} bits per byte{_ends(each)} of {each['bytes']:,} bytes"
        line += f", n {each['n']:,}"
        if path in others:
            line += f"; {others[path]['bits_per_byte']:.4f}{_ends(others[path])} of {other['path']}"
            line += f", difference {differences[path]['difference']:+.4f}{_ends(differences[path], '+.4f')}"
        found.append(line)
    return found


def _ends(figure: Figures, form: str = ".4f") -> str:
    """An interval, where there is one."""
    return "" if figure["low"] is None else f" ({figure['low']:{form}} to {figure['high']:{form}})"


def _harness_lines(figures: Figures) -> list[str]:
    """lm_eval's figures as it prints them: a share is a number from 0 to 1."""
    bundle, other = figures["bundle"], figures.get("against")
    found = _task_lines(bundle["harness"])
    if other:
        versus = f"{bundle['path']} minus {other['path']}"
        found += [f"{other['path']}, {line}" for line in _task_lines(other["harness"])]
        found += [f"{versus}, {task}: {_differences(each)}" for task, each in figures["harness_difference"].items()]
        found += [
            f"{versus}, {suite}: {each['difference']:+.4f}{_ends(each, '+.4f')}"
            for suite, each in figures["suite_difference"].items()
        ]
    return found


def _task_lines(figures: Figures) -> list[str]:
    found = []
    for task, each in figures["tasks"].items():
        metrics = [f"{name} {of['value']:.4g}{_ends(of, '.4g')}" for name, of in each["metrics"].items()]
        chance = f", chance {each['chance']:.4g}" if each["chance"] else ""
        found.append(f"{task}, {each['shots']} shots: {', '.join(metrics)}{chance}, n {each['n']:,}")
    for suite, each in figures["suites"].items():
        asked, missing = len(each["tasks"]), each["missing"]
        part = f"{asked} tasks"
        if missing:  # a suite without some of its tasks is called a part
            part = f"{asked} of its {asked + len(missing)} tasks, without {' and '.join(missing)}"
        value = f"{each['value']:.4f}{_ends(each)} above chance (1: all right)"
        found.append(f"{suite} ({part}): {value}, n {each['n']:,}")
    return found


def _contamination_lines(figures: Figures) -> list[str]:
    overlaps = figures["overlaps"]
    head = (
        f"{len(overlaps):,} of {figures['questions']:,} questions share {figures['n']} words in a row with the "
        f"training text (documents: {figures['documents']:,}, {figures['text_bytes'] / 1e6:.1f} MB)"
    )
    if figures["unsearched"]:
        head += f"; {figures['unsearched']:,} were too short to look for"
    found = [head] + [
        f"  question {each['question']}, {100 * each['share']:.0f} % of it, in {each['where']}: {each['ngram']!r}"
        for each in overlaps[:MAX_SHOWN]
    ]
    if overlaps:
        parts = (("without them, greedy", "clean_scores"), ("on them alone", "copied_scores"))
        found += [f"{what}: {_scores(figures[key])}" for what, key in parts if figures[key]]
        if figures["copied_minus_clean"]:
            found.append(f"on them minus without them: {_differences(figures['copied_minus_clean'])}")
    return found
