"""What was run, and what came of it, in one table: a row for each fact, a column for each run."""

from collections.abc import Iterator, Sequence
from statistics import median

from nanollm.progress import duration
from nanollm.report.folder import Run
from nanollm.train.run import flat


def facts(runs: Sequence[Run], price: float | None) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table at the top: what is told, and of each run what it says."""
    rows: list[dict[str, str]] = [dict(facts_of(run, price)) for run in runs]
    for name in dict.fromkeys(name for row in rows for name in row):
        yield name, [row.get(name, "") for row in rows]


def facts_of(run: Run, price: float | None) -> Iterator[tuple[str, str]]:
    """What one run says of itself, as far as it has come."""
    yield "stage", run.stage
    state = "done" if run.is_done else f"{run.step / run.steps:.0%}"
    yield "steps", f"{run.step:,} of {run.steps:,} ({state})"
    if run.model:
        total, active = run.model.total_parameters, run.model.active_parameters
        yield "parameters", f"{total:,}, {active:,} active per token"
    if run.tokens_per_step:
        yield "tokens", f"{run.step * run.tokens_per_step:,} ({run.tokens_per_step:,} per step)"
    yield from outcomes(run)
    if run.seconds:
        yield "time", f"{duration(run.seconds)}, until the last line, evaluations included"
        if price is not None:
            yield "cost", f"{run.seconds / 3600 * price:,.2f} at {price:g} per hour"
    if rates := run.numbers.get("tokens_per_s"):
        yield "speed", f"{median(rate for _, rate in rates):,.0f} tokens/s (median)"
    if peaks := run.numbers.get("peak_memory_gb"):
        yield "peak memory", f"{max(peak for _, peak in peaks):.2f} GB"
    if run.skipped:
        steps = ", ".join(f"{step:,}" for step in run.skipped[:10])
        yield "skipped updates", f"{len(run.skipped):,} (steps {steps}{', ...' if run.skipped[10:] else ''})"
    yield from origin(run)


def outcomes(run: Run) -> Iterator[tuple[str, str]]:
    """Before and after."""
    for name, title, form in (
        ("val_bpb", "bits per byte", "{:.4f}"),
        ("val_loss", "validation loss", "{:.4f}"),
        ("val_accuracy", "problems solved", "{:.1%}"),
        ("reward", "reward", "{:.3f}"),
    ):
        if name in run.numbers and not (name == "val_loss" and "val_bpb" in run.numbers):
            (_, before), (_, after) = run.numbers[name][0], run.numbers[name][-1]
            yield title, f"{form.format(before)} → {form.format(after)}"


def origin(run: Run) -> Iterator[tuple[str, str]]:
    """Which code, machine and data."""
    if run.starts:
        last = run.starts[-1]
        device = last["gpu"] if run.settings.get("device") == "cuda" else last["processor"]
        yield "machine", f"{device}, {last['cores']} cores, {last['threads']} threads, {last['processes']} process(es)"
        yield "computed in", str(run.settings.get("dtype", ""))
        commit = last["commit"] or "unknown"
        yield "code", f"nanollm {last['nanollm']}, commit {commit}, torch {last['torch']}, Python {last['python']}"
    for folder, manifest in run.data.items():
        train = manifest["splits"]["train"]
        yield f"data in {folder}", f"{train['tokens']:,} tokens of {manifest['source'].get('dataset', 'files')}"
    for name, digest in sorted(run.inputs.items()):
        yield f"sha256 of {name}", str(digest)[:16]


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Dotted names of the settings in which runs differ, and what each has."""
    settings = [flat(run.settings) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    cells = {name: [each.get(name, "(not there)") for each in settings] for name in names}
    return [(name, of_runs) for name, of_runs in cells.items() if len(set(of_runs)) > 1 and name != "out"]
