"""How is an evaluation written down: as numbers for eval.json, as replies for samples.jsonl, as lines for people?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nanollm.evals.bits_per_byte import BitsPerByte
from nanollm.evals.contamination import Contamination
from nanollm.evals.intervals import paired, pass_at_k
from nanollm.evals.problems import Accuracy, Judged

Figures = dict[str, Any]

WORST_SHOWN = 3  # questions that stand in the training text


# --- eval.json ---


def of_greedy(judged: Judged) -> Figures:
    """The first reply to each problem, by grader."""
    return {"scores": {name: _of_verdicts(judged.first(name)) for name in judged.verdicts}} | _of_replies(judged)


def of_samples(judged: Judged, samples: int, tries: Sequence[int]) -> Figures:
    """pass@k of all replies, by grader."""
    correct = {name: [sum(of_problem) for of_problem in verdicts] for name, verdicts in judged.verdicts.items()}
    scores = {
        name: {f"pass@{k}": asdict(pass_at_k(counts, samples, k)) for k in tries} for name, counts in correct.items()
    }
    return {"scores": scores} | _of_replies(judged)


def of_difference(first: Judged, second: Judged) -> Figures:
    """By grader, first minus second on the same problems."""
    pairs = {name: paired(first.first(name), second.first(name)) for name in first.verdicts}
    return {name: {"difference": pair.difference} | asdict(pair) for name, pair in pairs.items()}


def of_bits(score: BitsPerByte) -> Figures:
    return {"bits_per_byte": score.value} | asdict(score)


def of_contamination(found: Contamination, judged: Judged) -> Figures:
    """What was found, and the score on the questions that were not."""
    dirty = {overlap.question for overlap in found.overlaps}
    clean = [place for place in range(found.questions) if place + 1 not in dirty]
    scores = {name: _of_verdicts([judged.first(name)[place] for place in clean]) for name in judged.verdicts if clean}
    return asdict(found) | {"clean_scores": scores}


def _of_verdicts(verdicts: Sequence[bool]) -> Figures:
    accuracy = Accuracy.of(verdicts)
    return {"value": accuracy.value} | asdict(accuracy)


def _of_replies(judged: Judged) -> Figures:
    return {
        "ended": judged.ended,
        "mean_tokens": judged.mean_tokens,
        "no_room": judged.no_room,
        "grader_faults": judged.faults,
    }


# --- samples.jsonl ---


def records(replies: Mapping[str, Judged]) -> Iterator[Figures]:
    """One per problem: question, gold answer, and under each name the replies with what the graders said.

    Everyone in `replies`, at least one, has tried the same problems.
    """
    for place, attempt in enumerate(next(iter(replies.values())).attempts):
        record: Figures = {"question": attempt.problem.question, "gold": attempt.problem.answer}
        yield record | {name: _of_problem(judged, place) for name, judged in replies.items()}


def _of_problem(judged: Judged, place: int) -> Figures:
    attempt = judged.attempts[place]
    verdicts = {grader: of_problems[place] for grader, of_problems in judged.verdicts.items()}
    return {"replies": attempt.replies, "finish": attempt.finish, "tokens": attempt.tokens, "verdicts": verdicts}


# --- lines for people ---


def lines(figures: Figures) -> list[str]:
    """One line per figure of an eval.json."""
    settings, bundle, other = figures["settings"], figures["bundle"], figures.get("against", {})
    task = f"{settings['task']['name']} {settings['task']['split']}"
    found = []
    if "greedy" in bundle:
        found += [f"{task}, greedy: {_scores(bundle['greedy']['scores'])}", _replies(bundle["greedy"])]
    if "samples" in bundle:
        found += _pass_lines(
            f"{task}, {settings['samples']} samples at temperature {settings['temperature']:g}", bundle["samples"]
        )
    if "greedy" in other:
        found += [f"{other['path']}, greedy: {_scores(other['greedy']['scores'])}", _replies(other["greedy"])]
        found += [f"{bundle['path']} minus {other['path']}: {_differences(figures['difference'])}"]
    found += _bits_lines(bundle, other)
    if "harness" in bundle:
        found += _harness_lines(figures)
    if "contamination" in figures:
        found += _contamination_lines(figures["contamination"])
    return found


def _scores(scores: Figures) -> str:
    n = next(iter(scores.values()))["n"]
    return ", ".join([f"{_percent(score)} {name} {_interval(score)}" for name, score in scores.items()] + [f"n {n:,}"])


def _percent(score: Figures) -> str:
    return f"{100 * score['value']:.1f} %"


def _interval(score: Figures) -> str:
    return f"({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _replies(figures: Figures) -> str:
    parts = [f"replies: {100 * figures['ended']:.1f} % ended by the model", f"{figures['mean_tokens']:.1f} tokens each"]
    if figures["no_room"]:
        parts.append(f"{figures['no_room']:,} questions did not fit the context and count as wrong")
    if figures["grader_faults"]:
        parts.append(f"the grader failed on {figures['grader_faults']:,}, which count as wrong")
    return ", ".join(parts)


def _pass_lines(what: str, figures: Figures) -> list[str]:
    scores = figures["scores"]
    return [
        f"{what}, {k}: "
        + ", ".join(f"{_percent(of_k[k])} {name} {_interval(of_k[k])}" for name, of_k in scores.items())
        for k in next(iter(scores.values()))
    ]


def _differences(differences: Figures) -> str:
    return "; ".join(
        f"{100 * each['difference']:+.1f} points {name} ({100 * each['low']:+.1f} to {100 * each['high']:+.1f}), "
        f"p {each['p']:.2g}"
        for name, each in differences.items()
    )


def _bits_lines(bundle: Figures, other: Figures) -> list[str]:
    measured = [*bundle.get("text", []), *bundle.get("data", [])]
    others = {each["path"]: each for each in [*other.get("text", []), *other.get("data", [])]}
    found = []
    for each in measured:
        line = f"{each['path']}: {each['bits_per_byte']:.4f} bits per byte of {each['bytes']:,} bytes"
        if each["path"] in others:
            line += f"; {others[each['path']]['bits_per_byte']:.4f} of {other['path']}"
        found.append(line)
    return found


def _harness_lines(figures: Figures) -> list[str]:
    """lm_eval's figures as it prints them: a share is a number from 0 to 1."""
    bundle, other = figures["bundle"], figures.get("against")
    found = [_harness_line(task, of_task) for task, of_task in bundle["harness"]["tasks"].items()]
    if other:
        tasks = other["harness"]["tasks"].items()
        found += [f"{other['path']}, {_harness_line(task, of_task)}" for task, of_task in tasks]
        pairs = figures["harness_difference"].items()
        found += [f"{bundle['path']} minus {other['path']}, {task}: {_differences(of_task)}" for task, of_task in pairs]
    return found


def _harness_line(task: str, figures: Figures) -> str:
    metrics = ", ".join(
        f"{name} {of_metric['value']:.4g}"
        + ("" if of_metric["low"] is None else f" ({of_metric['low']:.4g} to {of_metric['high']:.4g})")
        for name, of_metric in figures["metrics"].items()
    )
    return f"{task}, {figures['shots']} shots: {metrics}, n {figures['n']:,}"


def _contamination_lines(figures: Figures) -> list[str]:
    overlaps = figures["overlaps"]
    head = (
        f"{len(overlaps):,} of {figures['questions']:,} questions share {figures['n']} words in a row with the "
        f"training text (documents: {figures['documents']:,}, {figures['text_bytes'] / 1e6:.1f} MB)"
    )
    if figures["unsearched"]:
        head += f"; {figures['unsearched']:,} were too short to look for"
    worst = [
        f"  question {each['question']}, {100 * each['share']:.0f} % of it, in {each['where']}: {each['ngram']!r}"
        for each in overlaps[:WORST_SHOWN]
    ]
    clean = (
        [f"without them, greedy: {_scores(figures['clean_scores'])}"] if overlaps and figures["clean_scores"] else []
    )
    return [head, *worst, *clean]
