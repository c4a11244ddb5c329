"""Does a run that goes on for long grow slower, or larger?

    python -m tests.faults.training_soak --minutes 45 [--json FILE] [-- pretrain --model nano-1m ... --out FOLDER]

Starts the command as its user does (without one: a nano-1m on the built-in text, which validates, samples and saves
all the time), looks at its memory, its open files and its processor time every few seconds, and asks it to stop when
the time is over. Drift is the median of the last third against that of the first; the first tenth
is warm-up and left out. Other work on the machine changes tokens per second; tokens per second of processor time less.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from nanollm.train.metrics import read_metrics

EVERY_S = 5.0
MAX_DRIFT = 0.02
DRIFTS = {"tokens_per_s": -1, "memory_bytes": 1, "files": 1, "threads": 1}
"""Which way is worse."""


def soak(words: list[str], minutes: float) -> dict[str, object]:
    """Let a command train for so long; what was seen of it. `--out` must be among the words."""
    out = Path(words[words.index("--out") + 1])
    looks: list[dict[str, float]] = []
    with subprocess.Popen([sys.executable, "-m", "nanollm", *words]) as process:
        seen, began = psutil.Process(process.pid), time.monotonic()
        while process.poll() is None and time.monotonic() < began + 60 * minutes:
            time.sleep(EVERY_S)
            times = seen.cpu_times()
            looks.append(
                {
                    "s": time.monotonic() - began,
                    "memory": seen.memory_info().rss,
                    "files": seen.num_fds(),
                    "threads": seen.num_threads(),
                    "processor_s": times.user + times.system,
                    "step": last_step(out),
                }
            )
        process.terminate()
    if process.returncode != 143:
        raise SystemExit(f"the run ended by itself, with exit code {process.returncode}; give it more steps")
    rates = [line["tokens_per_s"] for line in read_metrics(out) if "tokens_per_s" in line]
    usual = looks[len(looks) // 10 :]
    stretches = zip(usual, usual[max(1, len(usual) // 20) :], strict=False)
    work = [(b["step"] - a["step"]) / (b["processor_s"] - a["processor_s"]) for a, b in stretches]
    return {
        "minutes": looks[-1]["s"] / 60,
        "steps": looks[-1]["step"],
        "tokens_per_s": ends(rates[len(rates) // 10 :]),
        "steps_per_processor_s": ends(work),
        "memory_bytes": ends([look["memory"] for look in usual]),
        "files": ends([look["files"] for look in usual]),
        "threads": ends([look["threads"] for look in usual]),
    }


def built_in(folder: Path) -> list[str]:
    """A run on the text of this machine, prepared in a folder."""
    tokenizer, tokens = folder / "tokenizer", folder / "tokens"
    for words in (
        ["tokenizer", "--corpus", "builtin", "--output_dir", tokenizer, "--vocab_size", 2048],
        ["preprocess", "text", "--input", "builtin", "--tokenizer_path", tokenizer, "--save_dir", tokens],
    ):
        subprocess.run([sys.executable, "-m", "nanollm", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    size = ["--train.steps", 10**7, "--train.batch_size", 8, "--train.micro_batch_size", 8]
    often = [f"--train.{name}_every={steps}" for name, steps in {"validate": 50, "sample": 50, "save": 50}.items()]
    data = ["--tokenizer_path", tokenizer, "--data", tokens, "--out", folder / "run"]
    return list(map(str, ["pretrain", "--model", "nano-1m", "--model.vocab_size", 2048, *data, *size, *often]))


def last_step(out: Path) -> int:
    try:
        whole = (out / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]  # the last line may be half written
    except FileNotFoundError:
        return 0
    return int(json.loads(whole.splitlines()[-1])["step"]) if whole else 0


def ends(values: list[float]) -> dict[str, float]:
    """Medians of the first and of the last third, and what the last is more, as a share."""
    third = max(1, len(values) // 3)
    first, last = median(values[:third]), median(values[-third:])
    return {"first": first, "last": last, "drift": last / first - 1}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.training_soak", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--json", type=Path, help="also write what was seen into this file")
    parser.add_argument("words", nargs="*", help="what follows nanollm, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(options.words or built_in(Path(folder)), options.minutes)
    for name, value in seen.items():
        print(f"{name:24}", f"{value['drift']:+.2%}  {value}" if isinstance(value, dict) else value)
    if options.json:
        options.json.write_text(json.dumps(seen, indent=2) + "\n")
    if worse := [name for name, bad in DRIFTS.items() if bad * seen[name]["drift"] > MAX_DRIFT]:
        sys.exit(f"{', '.join(worse)}: more than {MAX_DRIFT:.0%} worse at last")


if __name__ == "__main__":
    main()
