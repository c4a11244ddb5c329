"""What does each change bring? `python benchmarks/ablations.py [ROW ...] [--seeds 0 1 2] [--table]`

Runs every row of variants.py with every seed, all rows with the first seed before the second, one after the other on
one core, each at equal tokens. A finished run is one JSON file and is never done again; one that was cut off is started
anew. --table writes docs/ablations.md from the files.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
if str(PROJECT) not in sys.path:
    sys.path.insert(0, str(PROJECT))

from benchmarks.trial import CORPUS, PREPARED, Run, Text, equal_bytes, prepare  # noqa: E402
from nanollm.durable import write_json  # noqa: E402
from nanollm.origin import commit  # noqa: E402

RESULTS = PROJECT / "benchmarks" / "results" / "ablations"
TABLE = PROJECT / "docs" / "ablations.md"
SHAPE = ("preset", "context_length", "tokens", "validation_windows")  # equal in all runs of a table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "rows", nargs="*", metavar="ROW", help="of variants.py (default: all ROWS); `search`: SEARCH; TRIALS by name"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--corpus", type=Path, default=CORPUS, help="text to train on, as Parquet files of OpenWebText")
    p.add_argument("--prepared", type=Path, default=PREPARED, help="folder of tokenizer-N and owt-N; filled if empty")
    p.add_argument("--preset", default="nano-5m")
    p.add_argument("--context_length", type=int, default=256)
    p.add_argument("--tokens", type=int, default=131_072, help="tokens of a run with 4,096 pieces")
    p.add_argument("--validation_windows", type=int, default=128)
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--table", action="store_true", help="write docs/ablations.md from the results and stop")
    p.add_argument("--out", type=Path, default=TABLE, help="where --table writes")
    p.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process does the one run asked for
    return p


def main(words: Sequence[str]) -> int:
    """Exit status: 0 all done, 1 a run failed, 2 unknown words."""
    o = parser().parse_args(words)
    try:
        if o.table:
            o.out.write_text(table(read_results(o.results)), encoding="utf-8", newline="\n")
            print(o.out)
            return 0
        from benchmarks.variants import ROWS, SEARCH, TRIALS

        known = ROWS | SEARCH | TRIALS
        rows = [row for word in o.rows or list(ROWS) for row in (SEARCH if word == "search" else [word])]
        if unknown := [row for row in rows if row not in known]:
            raise ValueError(f"unknown row {unknown[0]}; they are search, {', '.join(known)}")
        if o.here:
            o.results.mkdir(parents=True, exist_ok=True)
            for seed, row in missing(rows, o):
                write_json(o.results / f"{row}_{seed}.json", one_run(row, seed, o))
            return 0
        for pieces in sorted({4096, *(known[row].pieces for row in rows)}):
            prepare(o.corpus, o.prepared, pieces)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    return campaign(rows, o)


def missing(rows: Sequence[str], o: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Seeds and rows that have no result yet, all rows of the first seed first; looked up when their turn comes."""
    for seed in o.seeds:
        for row in rows:
            if not (o.results / f"{row}_{seed}.json").exists():
                yield seed, row


def campaign(rows: Sequence[str], o: argparse.Namespace) -> int:
    """All that is missing, each run in a process of its own: it reads the code anew and leaves nothing behind."""
    if hasattr(os, "nice"):
        os.nice(19)
    same = ("threads", "corpus", "prepared", "preset", "context_length", "tokens", "validation_windows", "results")
    shared = [word for name in same for word in (f"--{name}", str(getattr(o, name)))]
    for seed, row in missing(rows, o):
        print(f"{datetime.datetime.now():%H:%M:%S} {row}, seed {seed}", flush=True)
        command = [sys.executable, __file__, row, "--seeds", str(seed), "--here", *shared]
        if (rc := subprocess.run(command, check=False).returncode) != 0:
            print(f"{row}, seed {seed}: failed with exit code {rc}", file=sys.stderr)
            return 1
    return 0


def one_run(row: str, seed: int, o: argparse.Namespace) -> dict[str, Any]:
    """Train one variant with one seed; returns what its JSON file holds."""
    import torch

    torch.set_num_threads(o.threads)
    from benchmarks.variants import ROWS, SEARCH, TRIALS, active_flops_per_token
    from nanollm.settings import load_preset
    from nanollm.world import World

    v = (ROWS | SEARCH | TRIALS)[row]
    world = World.start("cpu")
    config = v.config(load_preset("model", o.preset), o.context_length)
    text = Text.open(o.prepared, v.pieces)
    tokens = o.tokens * v.share * equal_bytes(o.prepared, v.pieces)
    steps = max(1, round(tokens / (v.batch_size * o.context_length)))
    run = Run.start(v, config, seed, text, world)
    model = run.state.model
    facts: dict[str, float] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_flops_per_token": active_flops_per_token(model, o.context_length),
    }
    wall, cpu = time.perf_counter(), time.process_time()
    stats = [run.step(step, steps) for step in range(steps)]
    facts |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    score = run.validate(o.validation_windows)
    if v.whole_split:
        facts["bits_per_byte_whole_split"] = run.validate(None).value
    fullest = [max((max(shares) * len(shares) for shares in each.expert_load), default=1.0) for each in stats]
    return {
        "row": row,
        "seed": seed,
        "about": v.about,
        "against": v.against,
        "bits_per_byte": score.value,
        "nats_per_token": score.nats / score.tokens,
        "tokens": steps * v.batch_size * o.context_length,
        **facts,
        "load_max_over_mean": statistics.mean(fullest[-max(1, steps // 4) :]),
        "curve": curve([each.loss for each in stats], v.batch_size * o.context_length),
        "settings": {
            **{name: getattr(o, name) for name in SHAPE},
            "steps": steps,
            "batch_size": v.batch_size,
            "pieces": v.pieces,
            "share": v.share,
            "model": dataclasses.asdict(config),
            "optim": dataclasses.asdict(v.optim),
            "tuning": dataclasses.asdict(v.tuning),
            "dtype": world.names["dtype"],
            "threads": o.threads,
        },
        "commit": commit() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
    }


def curve(losses: Sequence[float], tokens_per_step: int, points: int = 16) -> list[list[float]]:
    """Tokens read and the mean training loss (nats per token) since the point before."""
    size = max(1, -(-len(losses) // points))
    parts = [(end, losses[max(0, end - size) : end]) for end in range(size, len(losses) + size, size)]
    return [[min(end, len(losses)) * tokens_per_step, round(statistics.mean(part), 4)] for end, part in parts]


def read_results(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Row to seed to what its run found."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_bytes())
        results.setdefault(run["row"], {})[run["seed"]] = run
    return results


# Half-widths of the 95 % interval of a mean in standard errors, by the number of values (Student's t).
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}

HEAD = """# Ablations

What each change brings on its own: {preset} in {dtype}, {tokens:,} tokens of mixed English (the text of
docs/log.md's experiments) in windows of {context_length}, {pieces:,} pieces, {threads} core. Written by
`python benchmarks/ablations.py --table` from `benchmarks/results/ablations/*.json`, one file per run; negative rows
are here too.

**How to read it.** Bits per byte of validation ({validation_windows} windows, always the same), mean over the seeds and
their standard deviation; lower is better. A seed decides the first weights and the order of the windows, so that a row
and the row it is compared with read the same windows in the same order: the difference is taken seed by seed. It is a
**tie** when zero lies inside the 95 % interval (Student's t) of these paired differences; "better" and "worse" say that
it does not; with one seed there is no verdict. CPU time is of training alone and includes what other work on the
machine cost; MFLOP are of training on one token, the experts that it does not meet left out. These are the first
minutes of a training: what is a tie here may matter later, and the other way round.

"""

COLUMNS = """\
| row | change | bits per byte | seeds | against | difference | verdict | parameters | MFLOP/token | CPU s |
|---|---|---|---|---|---|---|---|---|---|
"""

Runs = Mapping[int, Mapping[str, Any]]  # by seed


def table(results: Mapping[str, Runs]) -> str:
    """docs/ablations.md."""
    from benchmarks.variants import ROWS, SEARCH, TRIALS

    runs = [run for by_seed in results.values() for run in by_seed.values()]
    if not runs:
        raise ValueError("there are no results yet: run python benchmarks/ablations.py")
    for name in SHAPE:
        if len(found := {run["settings"][name] for run in runs}) > 1:
            raise ValueError(f"runs of different {name} {sorted(found)} cannot stand in one table; move some away")
    text = HEAD.format(**{**runs[0]["settings"], "pieces": 4096})
    text += COLUMNS + "".join(line(row, results) for row in ROWS if row in results)
    if any(run["settings"]["pieces"] != 4096 for run in runs):
        text += "\nRows with another tokenizer are measured and compared on the whole validation split, the same text\n"
        text += "for all tokenizers; they read equal bytes of text.\n"
    if any(row in results for row in TRIALS):
        text += f"\n## Tried for `fast`\n\n{COLUMNS}"
        text += "".join(line(row, results) for row in TRIALS if row in results)
    if searched := [row for row in SEARCH if row in results]:
        text += f"\n## Learning rates\n\nSeed 0, {SEARCH[searched[0]].share:g} of the tokens.\n\n"
        text += "| optimizer | lr | bits per byte |\n|---|---|---|\n"
        for row in searched:
            run = results[row][min(results[row])]
            optim = run["settings"]["optim"]
            text += f"| {optim['name']}, {optim['schedule']} | {optim['lr']:g} | {run['bits_per_byte']:.4f} |\n"
    versions = sorted({f"torch {run['versions']['torch']}" for run in runs})
    commits = sorted({run["commit"] for run in runs})
    return f"{text}\nCommits {', '.join(commits)}; {', '.join(versions)}.\n"


def line(row: str, results: Mapping[str, Runs]) -> str:
    """One row of the table."""
    runs = results[row]
    any_run = runs[min(runs)]
    reference = results.get(any_run["against"] or "", {})
    against_another_tokenizer = any(
        r["settings"]["pieces"] != any_run["settings"]["pieces"] for r in reference.values()
    )
    measure = "bits_per_byte_whole_split" if against_another_tokenizer else "bits_per_byte"
    values = [runs[seed][measure] for seed in sorted(runs)]
    pairs = [runs[seed][measure] - reference[seed][measure] for seed in sorted(runs) if seed in reference]
    difference, verdict = compare(pairs)
    cells = [
        row,
        any_run["about"],
        mean_and_deviation(values),
        str(len(values)),
        any_run["against"] or "",
        difference,
        verdict,
        f"{any_run['parameters']:,}",
        f"{any_run['active_flops_per_token'] / 1e6:.1f}",
        f"{statistics.mean(run['cpu_s'] for run in runs.values()):.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def compare(pairs: Sequence[float]) -> tuple[str, str]:
    """Paired differences to what the table says of them: mean and deviation, and the verdict."""
    if not pairs:
        return "", ""
    if len(pairs) == 1:
        return f"{pairs[0]:+.4f}", "one seed"
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5
    is_tie = abs(mean) <= STUDENT[len(pairs)] * error
    return mean_and_deviation(pairs, "+"), "tie" if is_tie else "better" if mean < 0 else "worse"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
