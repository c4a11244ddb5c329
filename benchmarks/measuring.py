"""Measuring a speed so that it can be believed.

In turns with its baseline (A-B-A-B), because a shared machine changes its speed by the minute; as median and spread;
beside what this machine multiplies in the same turns. Torch is imported where it is needed: the processes whose memory
is measured import this module too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from nanollm.model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
Measurement = Callable[[], float]
"""Measures once. What the number is, the unit of the comparison says."""
Shape = tuple[int, int, int]
"""Rows, columns in, columns out: (rows, in) times (out, in) transposed."""


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """Repeated measurements of one number: median, least, greatest, how many, and the values in their order."""
    if not values:
        raise ValueError("a spread needs at least one measurement, got none")
    ends = {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
    return {**ends, "n": len(values), "values": list(values)}


def in_turns(
    sides: Mapping[str, Measurement],
    repeats: int = 5,
    *,
    roof: Mapping[str, Measurement] | None = None,
    warm_up: bool = False,
) -> dict[str, Any]:
    """Measure all sides once per turn, one after the other; the first side is the baseline.

    Returns {"sides": name -> spread, "ratio": name -> spread of (side / first side of the same turn)}, the first side
    without a ratio; with `roof`, what the machine gives is measured in each turn as well and is in "roof". `warm_up`
    calls every side once before, and forgets what it said.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    if warm_up:
        for name, measure in sides.items():
            tell(f"warm-up: {name}")
            measure()
    measured = {**sides, **(roof or {})}
    if len(measured) < len(sides) + len(roof or {}):
        raise ValueError(f"sides and roofs must have different names, got {', '.join([*sides, *(roof or {})])}")
    columns: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(repeats):
        for name, measure in measured.items():
            columns[name].append(measure())
        tell(f"turn {turn + 1} of {repeats}: " + ", ".join(f"{name} {columns[name][-1]:.5g}" for name in measured))
    facts = compared({name: columns[name] for name in sides})
    return facts | ({"roof": {name: spread_of(columns[name]) for name in roof}} if roof else {})


def compared(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The measurements of each side, turn by turn, as spreads; and the ratio to the first side in the same turn."""
    first = columns[next(iter(columns))]
    return {
        "sides": {name: spread_of(values) for name, values in columns.items()},
        "ratio": {
            name: spread_of([own / base for base, own in zip(first, columns[name], strict=True)])
            for name in list(columns)[1:]
        },
    }


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def matmul_roof(shapes: Sequence[Shape], dtype: "torch.dtype", device: str = "cpu") -> float:
    """GFLOP/s of the best of these products, each the best of five: no training step can be faster than that."""
    from torch.nn import functional as F

    best = 0.0
    for rows, width, out in shapes:
        x, weight = ones(rows, width, dtype, device), ones(out, width, dtype, device)

        def work(x: "torch.Tensor" = x, weight: "torch.Tensor" = weight) -> None:
            F.linear(x, weight)[0, 0].item()  # the item waits for the device

        work()
        best = max(best, 2 * rows * width * out / 1e9 / min(seconds(work) for _ in range(5)))
    return best


def ones(rows: int, columns: int, dtype: "torch.dtype", device: str) -> "torch.Tensor":
    import torch

    return torch.ones(rows, columns, dtype=dtype, device=device)


def model_shapes(c: "ModelConfig", rows: int) -> list[Shape]:
    """The products of one forward pass of `rows` tokens, each shape once, without the experts' (their rows vary)."""
    d, heads = c.d_model, c.n_heads
    shapes = [
        (rows, d, c.q_lora_rank),
        (rows, c.q_lora_rank, heads * c.qk_head_dim),
        (rows, d, c.cache_width),
        (rows, c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)),
        (rows, heads * c.v_head_dim, d),
        (rows, d, c.d_ff),
        (rows, c.d_ff, d),
        (rows, d, c.n_shared_experts * c.d_expert),
        (rows, c.n_shared_experts * c.d_expert, d),
        (rows, d, c.vocab_size),
    ]
    return list(dict.fromkeys(shapes))


def memory_gb() -> float:
    """What this process holds now, in GB (10^9 bytes) of resident memory."""
    return status_gb("VmRSS")


def peak_memory_gb() -> float:
    """The most that this process has held, in GB (10^9 bytes) of resident memory."""
    return status_gb("VmHWM")


def status_gb(key: str) -> float:
    """A size from /proc. Not getrusage: what that tells a process begins with the size of the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("memory is measured with /proc/self/status, which this operating system does not have")
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e9


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """--data FOLDER, for a benchmark that needs real text."""
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real data", metavar="FOLDER"
    )


def data_folder(options: argparse.Namespace, *needed: str) -> Path:
    """The folder of --data. Raises ValueError if it, or one of the needed things in it, is not there."""
    folder: Path = options.data
    for path in (folder, *(folder / name for name in needed)):
        if not path.exists():
            raise ValueError(f"this benchmark needs real text: {path} is not there; point --data at a folder with it")
    return folder


def tell(text: str) -> None:
    """A line for whoever waits; stdout belongs to the record."""
    print(f"  {text}", file=sys.stderr, flush=True)
