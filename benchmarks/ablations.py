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
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results" / "ablations"
TABLE = PROJECT / "docs" / "ablations.md"
CORPUS = PROJECT.parent / "shared" / "data" / "openwebtext"
PREPARED = Path.home() / ".cache" / "nanollm" / "ablations"
SHAPE = ("preset", "context_length", "tokens", "validation_windows")  # equal in all runs of a table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "rows", nargs="*", metavar="ROW", help="rows of variants.py (default: all); `search`: learning rates"
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
    o = parser().parse_args(words)
    if o.table:
        o.out.write_text(table(read_results(o.results)), encoding="utf-8", newline="\n")
        print(o.out)
        return 0
    from variants import ROWS, SEARCH

    known = ROWS | SEARCH
    rows = [row for word in o.rows or list(ROWS) for row in (SEARCH if word == "search" else [word])]
    if unknown := [row for row in rows if row not in known]:
        print(f"unknown row {unknown[0]}; they are search, {', '.join(known)}", file=sys.stderr)
        return 2
    o.results.mkdir(parents=True, exist_ok=True)
    for seed in o.seeds:
        for row in rows:
            path = o.results / f"{row}_{seed}.json"
            if path.exists():
                continue
            if o.here:
                from nanollm.durable import write_json

                write_json(path, one_run(row, seed, o))
                continue
            print(f"{datetime.datetime.now():%H:%M:%S} {row}, seed {seed}", flush=True)
            for pieces in {known[row].pieces, 4096}:
                prepare(o.corpus, o.prepared, pieces)
            # A process of its own: nothing is left behind for the next run, and the code is read anew.
            command = [sys.executable, __file__, *words_without_rows(o), "--seeds", str(seed), "--here", row]
            if (rc := subprocess.run(command, check=False).returncode) != 0:
                print(f"{row}, seed {seed}: failed with exit code {rc}", file=sys.stderr)
                return 1
    return 0


def words_without_rows(o: argparse.Namespace) -> list[str]:
    names = ("threads", "corpus", "prepared", "preset", "context_length", "tokens", "validation_windows", "results")
    return [word for name in names for word in (f"--{name}", str(getattr(o, name)))]


def prepare(corpus: Path, prepared: Path, pieces: int) -> None:
    """Tokenizer and token files of a size, unless they are there."""
    tokenizer, data = prepared / f"tokenizer-{pieces}", prepared / f"owt-{pieces}"
    if (data / "manifest.json").exists():
        return
    if not corpus.is_dir():
        raise SystemExit(f"{corpus} is not a folder of Parquet files; name one with --corpus")
    nanollm = [sys.executable, "-m", "nanollm"]
    learn = ["tokenizer", "--corpus", str(corpus), "--output_dir", str(tokenizer), "--vocab_size", str(pieces)]
    encode = ["preprocess", "owt", "--input", str(corpus), "--tokenizer_path", str(tokenizer), "--save_dir", str(data)]
    for words in (learn, encode):
        subprocess.run([*nanollm, *words], check=True)


def one_run(row: str, seed: int, o: argparse.Namespace) -> dict[str, Any]:
    """Train one variant with one seed; returns what its JSON file holds."""
    os.nice(19)
    import torch

    torch.set_num_threads(o.threads)
    from variants import ROWS, SEARCH, active_flops_per_token, build_optimizers

    from nanollm.data.batches import Windows, sequential_batches
    from nanollm.data.shards import Shards
    from nanollm.evals.bits_per_byte import bits_per_byte
    from nanollm.settings import load_preset
    from nanollm.text.tokenizer import Tokenizer
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import Muon, lr_at
    from nanollm.train.state import TrainState
    from nanollm.train.step import train_step
    from nanollm.world import World

    v = (ROWS | SEARCH)[row]
    world = World.start("cpu")
    tokenizer = Tokenizer.load(o.prepared / f"tokenizer-{v.pieces}")
    train, val = (
        Shards.open(o.prepared / f"owt-{v.pieces}", split, tokenizer_fingerprint=tokenizer.fingerprint)
        for split in ("train", "val")
    )
    config = v.config(load_preset("model", o.preset), o.context_length)
    windows = Windows(train, o.context_length, seed)
    tokens = o.tokens * v.share * equal_bytes(o.prepared, v.pieces)
    steps = max(1, round(tokens / (v.batch_size * o.context_length)))
    model = v.build(config, seed)
    facts: dict[str, float] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_flops_per_token": active_flops_per_token(model, o.context_length),
    }
    state = TrainState.start(model, v.optim, world.dtype)
    state.optimizers = build_optimizers(state.masters, v.optim, v.tuning, world.dtype)
    loss_of = partial(next_token_loss, balance_weight=v.optim.balance_weight)

    started, cpu, losses, fullest = time.perf_counter(), time.process_time(), [], []
    for step in range(steps):
        for optimizer in state.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.param_groups[0]["momentum"] = v.tuning.momentum_at(step, v.optim)
        batches = windows.micro_batches(step, v.batch_size, v.batch_size)
        stats = train_step(state, batches, loss_of, lr_at(step, steps, v.optim), v.optim, world)
        losses.append(stats.loss)
        fullest.append(max((max(shares) * len(shares) for shares in stats.expert_load), default=1.0))
    facts |= {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    score = bits_per_byte(
        state.model, sequential_batches(val, o.context_length, 8, o.validation_windows), tokenizer.token_bytes
    )
    if v.whole_split:
        whole = bits_per_byte(state.model, sequential_batches(val, o.context_length, 8), tokenizer.token_bytes)
        facts["bits_per_byte_whole_split"] = whole.value
    quarter = max(1, steps // 4)
    return {
        "row": row,
        "seed": seed,
        "about": v.about,
        "against": v.against,
        "bits_per_byte": score.value,
        "nats_per_token": score.nats / score.tokens,
        "tokens": steps * v.batch_size * o.context_length,
        **facts,
        "load_max_over_mean": statistics.mean(fullest[-quarter:]),
        "curve": curve(losses, v.batch_size * o.context_length),
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
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
    }


def equal_bytes(prepared: Path, pieces: int) -> float:
    """Tokens of a tokenizer over those of 4,096 pieces that hold as many bytes of the training text."""
    per_byte = []
    for size in (pieces, 4096):
        split = json.loads((prepared / f"owt-{size}" / "manifest.json").read_bytes())["splits"]["train"]
        per_byte.append(split["tokens"] / split["text_bytes"])
    return per_byte[0] / per_byte[1]


def curve(losses: Sequence[float], tokens_per_step: int, points: int = 16) -> list[list[float]]:
    """Tokens read and the mean training loss (nats per token) since the point before."""
    size = max(1, -(-len(losses) // points))
    parts = [(end, losses[max(0, end - size) : end]) for end in range(size, len(losses) + size, size)]
    return [[min(end, len(losses)) * tokens_per_step, round(statistics.mean(part), 4)] for end, part in parts]


def commit() -> str:
    """The commit, with + if the working tree differs from it."""
    describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return (
        subprocess.run(describe, check=False, capture_output=True, text=True, cwd=PROJECT).stdout.strip() or "unknown"
    )


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
machine cost; MFLOP are of training on one token, the experts that it does not meet left out.

| row | change | bits per byte | seeds | against | difference | verdict | parameters | MFLOP/token | CPU s |
|---|---|---|---|---|---|---|---|---|---|
"""

Runs = Mapping[int, Mapping[str, Any]]  # by seed


def table(results: Mapping[str, Runs]) -> str:
    """docs/ablations.md."""
    from variants import ROWS, SEARCH

    runs = [run for by_seed in results.values() for run in by_seed.values()]
    if not runs:
        raise SystemExit("there are no results yet: run python benchmarks/ablations.py")
    for name in SHAPE:
        if len(found := {run["settings"][name] for run in runs}) > 1:
            raise SystemExit(f"runs of different {name} {sorted(found)} cannot stand in one table; move some away")
    text = HEAD.format(**{**runs[0]["settings"], "pieces": 4096})
    text += "".join(line(row, results) for row in ROWS if row in results)
    whole = [row for row in ROWS if row in results and ROWS[row].whole_split]
    if whole:
        text += "\nRows with another tokenizer are measured and compared on the whole validation split, the same text\n"
        text += "for all tokenizers; they read equal bytes of text.\n"
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
