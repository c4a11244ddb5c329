"""Ablations: what each change to the recipe brings on its own, at equal tokens on one core.

    python benchmarks/ablations.py [ROW ...] [--seeds 0 1 2] [--table]

Runs every row of variants.py with every seed, all rows of the first seed before those of the second. A finished run
is one line of results/ablations.csv and is never repeated; one that was cut off starts anew. --table writes
docs/ablations.md from the file.
"""

import argparse
import csv
import dataclasses
import datetime
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

PROJECT = Path(__file__).resolve().parents[1]
if str(PROJECT) not in sys.path:
    sys.path.insert(0, str(PROJECT))

from benchmarks.trial import CORPUS, PREPARED, Run, Text, equal_bytes, prepare  # noqa: E402
from nanollm.origin import commit, processor  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.variants import Variant

RESULTS = PROJECT / "benchmarks" / "results" / "ablations.csv"
TABLE = PROJECT / "docs" / "ablations.md"


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """One trained variant: a line of the CSV file, whose columns are these fields."""

    row: str
    seed: int
    preset: str
    context_length: int
    tokens: int  # of a run with 4,096 pieces and share 1
    validation_windows: int
    pieces: int
    share: float
    batch_size: int
    steps: int
    optimizer: str
    schedule: str
    lr: float
    changes: str  # whatever else differs from the preset and from the defaults of OptimConfig and Tuning
    bits_per_byte: float
    bits_per_byte_whole_split: float | None
    nats_per_token: float
    parameters: int
    active_flops_per_token: int
    load_max_over_mean: float
    wall_s: float
    cpu_s: float
    dtype: str
    threads: int
    processor: str  # empty: not recorded
    torch: str
    commit: str
    date: str

    @classmethod
    def of_line(cls, line: Mapping[str, str]) -> "AblationRun":
        """The run of a line; ints and floats by the type of their field."""
        values: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            convert = {int: int, float: float}.get(f.type, str if f.type is str else optional_float)  # type: ignore[call-overload]
            values[f.name] = convert(line[f.name])
        return cls(**values)


def optional_float(text: str) -> float | None:
    return float(text) if text else None


# What all runs of a table have in common, and what makes a run another one
SHAPE = ("preset", "context_length", "tokens", "validation_windows")


def read_runs(path: Path, **shape: object) -> list[AblationRun]:
    """The runs of that shape (a value for each name of SHAPE; without any: all runs)."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        runs = [AblationRun.of_line(line) for line in csv.DictReader(file)]
    return [run for run in runs if all(getattr(run, name) == value for name, value in shape.items())]


def append_run(path: Path, run: AblationRun) -> None:
    """One line at the end, in a single write, so that campaigns on two cores may share the file."""
    columns = [f.name for f in dataclasses.fields(run)]
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(run))


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
    p.add_argument("--results", type=Path, default=RESULTS, help="CSV file, one line per run")
    p.add_argument("--table", action="store_true", help="write docs/ablations.md from the results and stop")
    p.add_argument("--out", type=Path, default=TABLE, help="where --table writes")
    p.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process does the one run asked for
    return p


def main(words: Sequence[str]) -> int:
    """Exit status: 0 all done, 1 a run failed, 2 unknown words."""
    o = parser().parse_args(words)
    try:
        if o.table:
            o.out.write_text(table(read_runs(o.results, **shape_of(o))), encoding="utf-8", newline="\n")
            print(o.out)
            return 0
        from benchmarks.variants import ROWS, SEARCH, TRIALS

        known = ROWS | SEARCH | TRIALS
        rows = [row for word in o.rows or list(ROWS) for row in (SEARCH if word == "search" else [word])]
        if unknown := [row for row in rows if row not in known]:
            raise ValueError(f"unknown row {unknown[0]}; they are search, {', '.join(known)}")
        if o.here:
            for seed, row in missing(rows, o):
                append_run(o.results, one_run(row, seed, o))
            return 0
        for pieces in sorted({4096, *(known[row].pieces for row in rows)}):
            prepare(o.corpus, o.prepared, pieces)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    return campaign(rows, o)


def shape_of(o: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(o, name) for name in SHAPE}


def missing(rows: Sequence[str], o: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Seeds and rows that have no result yet, all rows of the first seed first; looked up when their turn comes."""
    for seed in o.seeds:
        for row in rows:
            if (row, seed) not in {(run.row, run.seed) for run in read_runs(o.results, **shape_of(o))}:
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


def one_run(row: str, seed: int, o: argparse.Namespace) -> AblationRun:
    """Train one variant with one seed."""
    import torch

    torch.set_num_threads(o.threads)
    from benchmarks.variants import ROWS, SEARCH, TRIALS, active_flops_per_token
    from nanollm.config import load_preset
    from nanollm.world import World

    v = (ROWS | SEARCH | TRIALS)[row]
    world = World.start("cpu")
    config = v.config(load_preset("model", o.preset), o.context_length)
    text = Text.open(o.prepared, v.pieces)
    tokens = o.tokens * v.share * equal_bytes(o.prepared, v.pieces)
    steps = max(1, round(tokens / (v.batch_size * o.context_length)))
    run = Run.start(v, config, seed, text, world)
    model = run.state.model
    wall, cpu = time.perf_counter(), time.process_time()
    stats = [run.step(step, steps) for step in range(steps)]
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    score = run.validate(o.validation_windows)
    fullest = [max((max(shares) * len(shares) for shares in each.expert_load), default=1.0) for each in stats]
    return AblationRun(
        row=row,
        seed=seed,
        **shape_of(o),
        **settings_of(v),
        steps=steps,
        bits_per_byte=score.value,
        bits_per_byte_whole_split=run.validate(None).value if v.whole_split else None,
        nats_per_token=score.nats / score.tokens,
        parameters=sum(p.numel() for p in model.parameters()),
        active_flops_per_token=active_flops_per_token(model, o.context_length),
        load_max_over_mean=statistics.mean(fullest[-max(1, steps // 4) :]),
        wall_s=round(wall_s, 3),
        cpu_s=round(cpu_s, 3),
        dtype=world.names["dtype"],
        threads=o.threads,
        processor=processor(),
        torch=importlib.metadata.version("torch"),
        commit=commit() or "unknown",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def settings_of(v: "Variant") -> dict[str, Any]:
    """Columns that tell how a variant is trained."""
    from benchmarks.variants import Tuning
    from nanollm.train.optim import OptimConfig

    changes = [f"{name}={value}" for name, value in v.model.items()]
    for own, default in ((v.optim, OptimConfig()), (v.tuning, Tuning())):
        for name, value in dataclasses.asdict(own).items():
            if name not in ("name", "schedule", "lr") and value != getattr(default, name):
                changes.append(f"{name}={value:.6g}")
    return {
        **{name: getattr(v, name) for name in ("pieces", "share", "batch_size")},
        "optimizer": v.optim.name,
        "schedule": v.optim.schedule,
        "lr": v.optim.lr,
        "changes": " ".join(changes),
    }


# Half-widths of the 95 % interval of a mean in standard errors, by the number of values (Student's t).
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}

HEAD = """# Ablations

What each change brings on its own: {preset} in {dtype}, {tokens:,} tokens of mixed English in windows of
{context_length}, {pieces:,} pieces, {threads} core. `python benchmarks/ablations.py --table` writes this page from
`benchmarks/results/ablations.csv`, one line per run, negative results included.

**How to read it.** Bits per byte on {validation_windows} fixed validation windows, mean and standard deviation over
the seeds; lower is better. A seed decides the initial weights and the order of the windows, so a row and its baseline
read the same windows in the same order, and differences are paired by seed. A row is a **tie** if the 95 % interval
(Student's t) of these differences contains zero, otherwise "better" or "worse"; one seed gives no verdict. CPU time
covers training only, including slowdown from other programs. MFLOP are of training on one token, without its idle
experts. These are the first minutes of training: ties may matter later, and the other way round.

"""

COLUMNS = """\
| row | change | bits per byte | seeds | against | difference | verdict | parameters | MFLOP/token | CPU s |
|---|---|---|---|---|---|---|---|---|---|
"""

Runs = Mapping[int, AblationRun]  # by seed


def table(runs: Sequence[AblationRun]) -> str:
    """docs/ablations.md."""
    from benchmarks.variants import ROWS, SEARCH, TRIALS

    if not runs:
        raise ValueError("there are no results yet: run python benchmarks/ablations.py")
    results: dict[str, dict[int, AblationRun]] = {}
    for run in runs:
        results.setdefault(run.row, {})[run.seed] = run
    text = HEAD.format(**{**dataclasses.asdict(runs[0]), "pieces": 4096})
    text += COLUMNS + "".join(line(row, v, results) for row, v in ROWS.items() if row in results)
    if any(run.pieces != 4096 for run in runs):
        text += "\nRows with another tokenizer read equal bytes and are compared on the whole validation split.\n"
    if tried := [line(row, v, results) for row, v in TRIALS.items() if row in results]:
        text += f"\n## Tried for `fast`\n\n{COLUMNS}{''.join(tried)}"
    if searched := [results[row][min(results[row])] for row in SEARCH if row in results]:
        text += f"\n## Learning rates\n\nSeed 0, {searched[0].share:g} of the tokens.\n\n"
        text += "| optimizer | lr | bits per byte |\n|---|---|---|\n"
        for run in searched:
            text += f"| {run.optimizer}, {run.schedule} | {run.lr:g} | {run.bits_per_byte:.4f} |\n"
    commits = sorted({run.commit for run in runs})
    return f"{text}\nCommits {', '.join(commits)}; {', '.join(sorted({f'torch {run.torch}' for run in runs}))}.\n"


def line(row: str, v: "Variant", results: Mapping[str, Runs]) -> str:
    """One row of the table."""
    runs = results[row]
    any_run = runs[min(runs)]
    reference = results.get(v.against or "", {})
    needs_whole_split = any(run.pieces != any_run.pieces for run in reference.values())
    measure = "bits_per_byte_whole_split" if needs_whole_split else "bits_per_byte"
    values = {seed: getattr(runs[seed], measure) for seed in sorted(runs)}
    pairs = [value - getattr(reference[seed], measure) for seed, value in values.items() if seed in reference]
    cells = [
        row,
        v.about,
        mean_and_deviation(list(values.values())),
        str(len(values)),
        v.against or "",
        *compare(pairs),
        f"{any_run.parameters:,}",
        f"{any_run.active_flops_per_token / 1e6:.1f}",
        f"{statistics.mean(run.cpu_s for run in runs.values()):.0f}",
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
