"""How fast is it on this machine? `python benchmarks/run.py [NAME ...] [--save]`

Each benchmark gives several measurements of one number; mean, spread and count are printed. --save writes them with
commit, hardware and versions to benchmarks/results/<date>_<hardware>_<name>.json. Torch is imported where it is needed:
the workers of two_workers import this module again, and would wait for it.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanollm.settings import load_preset
from nanollm.sources import builtin
from nanollm.stages import preprocess
from nanollm.text.learn import train

if TYPE_CHECKING:
    from nanollm.world import World

RESULTS = Path(__file__).parent / "results"


def command_start() -> Iterator[float]:
    """Seconds from `nanollm --help` to its last word (limit: 0.5)."""
    for _ in range(10):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nanollm", "--help"], check=True, capture_output=True)
        yield time.perf_counter() - started


def matmul() -> Iterator[float]:
    """GFLOP/s of a 1024 x 1024 matrix product in the compute type of this machine: the limit of training."""
    import torch

    from nanollm.world import World

    world = World.start()
    a = torch.randn(1024, 1024, device=world.device, dtype=world.dtype)
    for _ in range(10):
        yield 20 * 2 * 1024**3 / seconds(world, lambda: [a @ a for _ in range(20)]) / 1e9


def training_step() -> Iterator[float]:
    """Tokens/s of whole optimizer steps of nano-5m: 8 sequences, AdamW."""
    import torch

    from nanollm.data.batches import Batch
    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState
    from nanollm.train.step import train_step
    from nanollm.world import World

    world, optim = World.start(), OptimConfig(name="adamw")
    c = ModelConfig(**load_preset("model", "nano-5m"))
    state = TrainState.start(Transformer(c).init(0).to(world.device), optim, world.dtype)
    ids = torch.randint(c.vocab_size, (8, c.context_length + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].to(world.device), ids[:, 1:].to(world.device))

    def step() -> None:
        train_step(
            state, [batch], lambda model, b: next_token_loss(model, b, optim.balance_weight), 1e-3, optim, World()
        )

    for _ in range(5):
        yield batch.count / seconds(world, step)


def two_workers() -> Iterator[float]:
    """Speed of preprocess with two processes over that with one, side by side, on the built-in corpus eight times."""
    with tempfile.TemporaryDirectory() as name:
        folder, documents = Path(name), list(builtin.documents())
        with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
            for text in documents * 8:
                file.write(json.dumps({"text": text}) + "\n")
        train(documents, folder / "tokenizer.model", vocab_size=8192)
        for _ in range(5):
            one, two = (prepared_in(folder, workers) for workers in (1, 2))
            yield one / two


def prepared_in(folder: Path, num_workers: int) -> float:
    """Seconds that preprocess takes, the start of its processes included."""
    out = folder / "tokens"
    config = preprocess.Config(
        kind="text",
        input=[folder / "corpus.jsonl"],
        tokenizer_path=folder / "tokenizer.model",
        save_dir=out,
        num_workers=num_workers,
    )
    started = time.perf_counter()
    preprocess.run(config)
    elapsed = time.perf_counter() - started
    shutil.rmtree(out)
    return elapsed


def seconds(world: "World", work: Callable[[], object]) -> float:
    """Wall time of the second of two calls; the first one warms up."""
    work()
    synchronize(world)
    started = time.perf_counter()
    work()
    synchronize(world)
    return time.perf_counter() - started


def synchronize(world: "World") -> None:
    if world.device.type == "cuda":
        import torch

        torch.cuda.synchronize(world.device)


BENCHMARKS = {
    "command_start": command_start,
    "matmul": matmul,
    "training_step": training_step,
    "two_workers": two_workers,
}


def hardware() -> dict[str, object]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit, with + if the working tree differs from it."""
    describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(describe, check=False, capture_output=True, text=True).stdout.strip() or "unknown"


def main(words: list[str]) -> int:
    names = [word for word in words if not word.startswith("--")] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"unknown benchmark {unknown[0]}; they are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in names:
        values = list(BENCHMARKS[name]())
        mean, spread = statistics.mean(values), statistics.stdev(values)
        about = (BENCHMARKS[name].__doc__ or "").rstrip(".")
        print(f"{name:<15}{mean:>12,.3f}  ± {spread:,.3f}  n={len(values)}   {about}")
        if "--save" in words:
            day, machine = datetime.date.today().isoformat(), hardware()
            label = str(machine["gpu"] or f"{machine['cores']}-cores").replace(" ", "-").lower()
            versions = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
            record = {"benchmark": name, "about": about, "commit": commit(), "hardware": machine, "versions": versions}
            record |= {"mean": mean, "stdev": spread, "n": len(values), "values": values}
            RESULTS.mkdir(exist_ok=True)
            text = json.dumps(record, indent=2) + "\n"
            (RESULTS / f"{day}_{label}_{name}.json").write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
