"""How is an evaluation written down: as numbers for eval.json, as replies for samples.jsonl, as lines for people?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nanollm.evals.bits_per_byte import Documents
from nanollm.evals.contamination import Contamination
from nanollm.evals.intervals import Mean, apart, paired, pass_at_k
from nanollm.evals.problems import Accuracy, Judged, majority

Figures = dict[str, Any]

WORST_SHOWN = 3  # questions that stand in the training text


# --- eval.json ---


def of_greedy(judged: Judged) -> Figures:
    """The first reply to each problem, by grader."""
    return {"scores": {name: _of_verdicts(judged.first(name)) for name in judged.verdicts}} | _of_replies(judged)


def of_samples(judged: Judged, samples: int, tries: Sequence[int]) -> Figures:
    """pass@k of all replies, by grader, and maj@k of all of them where answers can vote."""
    scores: Figures = {}
    for name, verdicts in judged.verdicts.items():
        counts = [sum(of_problem) for of_problem in verdicts]
        scores[name] = {f"pass@{k}": asdict(pass_at_k(counts, samples, k)) | {"n": len(counts)} for k in tries}
        if (solved := majority(judged, name)) is not None:
            scores[name][f"maj@{samples}"] = _of_verdicts(solved)
    return {"scores": scores} | _of_replies(judged)


def of_difference(first: Judged, second: Judged) -> Figures:
    """By grader, first minus second on the same problems."""
    pairs = {name: paired(first.first(name), second.first(name)) for name in first.verdicts}
    return {name: {"difference": pair.difference} | asdict(pair) for name, pair in pairs.items()}


def of_bits(found: Documents) -> Figures:
    """Bits per byte over n documents."""
    ratio = found.ratio
    return {
        "bits_per_byte": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "n": len(found.bytes),
        **asdict(found.total),
    }


def of_bits_difference(path: str, first: Documents, second: Documents) -> Figures:
    """First minus second on the same n documents."""
    ratio = first.minus(second)
    return {"path": path, "difference": ratio.value, "low": ratio.low, "high": ratio.high, "n": len(first.bytes)}


def of_contamination(found: Contamination, judged: Judged) -> Figures:
    """What was found, and the scores on the questions that were found, on the others, and how far they lie apart."""
    dirty = {overlap.question - 1 for overlap in found.overlaps}
    scores: dict[bool, dict[str, Figures]] = {True: {}, False: {}}
    for name in judged.verdicts:
        for is_clean in scores:
            verdicts = [right for place, right in enumerate(judged.first(name)) if (place in dirty) != is_clean]
            if verdicts:
                scores[is_clean][name] = _of_verdicts(verdicts)
    clean, copied = scores[True], scores[False]
    both = {name: apart(_mean(copied[name]), _mean(clean[name])) for name in clean if name in copied}
    return asdict(found) | {
        "clean_scores": clean,
        "copied_scores": copied,
        "copied_minus_clean": {
            name: {"difference": each.value, "low": each.low, "high": each.high} for name, each in both.items()
        },
    }


def _mean(score: Figures) -> Mean:
    return Mean(score["value"], score["low"], score["high"])


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
    """One line per figure of an eval.json. Files of earlier versions lack some, and have fewer lines."""
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
    found += _bits_lines(figures)
    if "harness" in bundle:
        found += _harness_lines(figures)
    if "contamination" in figures:
        found += _contamination_lines(figures["contamination"])
    return found


def _scores(scores: Figures) -> str:
    n = next(iter(scores.values()))["n"]
    return ", ".join([*(f"{_percent(score)} {name} {_interval(score)}" for name, score in scores.items()), f"n {n:,}"])


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
    tries = dict.fromkeys(k for of_grader in figures["scores"].values() for k in of_grader)
    by_tries = {k: {name: each[k] for name, each in figures["scores"].items() if k in each} for k in tries}
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
        line += f", n {each['n']:,}" if "n" in each else ""
        if path in others:
            line += f"; {others[path]['bits_per_byte']:.4f}{_ends(others[path])} of {other['path']}"
        if path in differences:
            line += f", difference {differences[path]['difference']:+.4f}{_ends(differences[path], '+')}"
        found.append(line)
    return found


def _ends(figure: Figures, sign: str = "") -> str:
    """An interval, where there is one."""
    return "" if figure.get("low") is None else f" ({figure['low']:{sign}.4f} to {figure['high']:{sign}.4f})"


def _harness_lines(figures: Figures) -> list[str]:
    """lm_eval's figures as it prints them: a share is a number from 0 to 1."""
    bundle, other = figures["bundle"], figures.get("against")
    found = _task_lines(bundle["harness"])
    if other:
        found += [f"{other['path']}, {line}" for line in _task_lines(other["harness"])]
        pairs = figures["harness_difference"].items()
        found += [f"{bundle['path']} minus {other['path']}, {task}: {_differences(of_task)}" for task, of_task in pairs]
        found += [
            f"{bundle['path']} minus {other['path']}, {suite}: {each['difference']:+.4f}{_ends(each, '+')}"
            for suite, each in figures.get("suite_difference", {}).items()
        ]
    return found


def _task_lines(figures: Figures) -> list[str]:
    tasks = [_harness_line(task, of_task) for task, of_task in figures["tasks"].items()]
    return tasks + [_suite_line(name, suite) for name, suite in figures.get("suites", {}).items()]


def _suite_line(name: str, figures: Figures) -> str:
    """A suite without some of its tasks is called what it is: a part."""
    asked, missing = len(figures["tasks"]), figures["missing"]
    part = (
        f"{asked} of its {asked + len(missing)} tasks, without {' and '.join(missing)}" if missing else f"{asked} tasks"
    )
    return f"{name} ({part}): {figures['value']:.4f}{_ends(figures)} above chance (1: all right), n {figures['n']:,}"


def _harness_line(task: str, figures: Figures) -> str:
    metrics = ", ".join(
        f"{name} {of_metric['value']:.4g}"
        + ("" if of_metric["low"] is None else f" ({of_metric['low']:.4g} to {of_metric['high']:.4g})")
        for name, of_metric in figures["metrics"].items()
    )
    chance = f", chance {figures['chance']:.4g}" if figures.get("chance") else ""
    return f"{task}, {figures['shots']} shots: {metrics}{chance}, n {figures['n']:,}"


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
    return [head, *worst, *_scores_without_copies(figures)]


def _scores_without_copies(figures: Figures) -> list[str]:
    if not figures["overlaps"]:
        return []
    parts = (("without them, greedy", "clean_scores"), ("on them alone", "copied_scores"))
    found = [f"{what}: {_scores(figures[key])}" for what, key in parts if figures.get(key)]
    difference = figures.get("copied_minus_clean")
    return found + ([f"on them minus without them: {_differences(difference)}"] if difference else [])


# --- contamination.md ---


def contamination_page(figures: Figures, questions: Sequence[str]) -> str:
    """What --contamination found, to be read or handed on: scores with and without the questions, then each of them.

    figures: a whole eval.json; questions: all that were asked.
    """
    found, settings = figures["contamination"], figures["settings"]
    head, task = _contamination_lines(found)[0], f"{settings['task']['name']} {settings['task']['split']}"
    scores = [f"- all of them, greedy: {_scores(figures['bundle']['greedy']['scores'])}"]
    scores += [f"- {line}" for line in _scores_without_copies(found)]
    rows = [
        f"| {each['question']} | {100 * each['share']:.0f} % | {_cell(each['where'])} | {_cell(each['ngram'])} "
        f"| {_cell(questions[each['question'] - 1])} |"
        for each in found["overlaps"]
    ]
    table = [
        "",
        "| question | found of it | first document | first words in common | the question |",
        "|---|---|---|---|---|",
    ]
    searched = ", ".join(settings["contamination"])
    lines_of_page = [f"# {task} in {searched}", "", f"{head}.", "", *scores, *([*table, *rows] if rows else [])]
    return "\n".join(lines_of_page) + "\n"


def _cell(text: str) -> str:
    """A text in a table of Markdown."""
    return " ".join(text.replace("|", "\\|").split())
