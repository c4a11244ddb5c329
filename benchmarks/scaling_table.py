"""What do many GPUs give, computed from what one was measured to give?

    python -m benchmarks.scaling_table          prints the tables of docs/scaling.md

Seconds of a step of `nanollm pretrain` on P GPUs: the work of one rank, rows and what does not shrink with them, and
what its messages take at the rate of the wires. Nothing here was measured on more than one GPU; the two ends are given,
everything hidden behind the backward pass and nothing.
Letters: N parameters, M of them in hidden matrices (Muon's), P ranks, H hosts of L ranks.
"""

import math
from dataclasses import dataclass

STEP_S, ADAMW_S, MUON_S, SHARDED_S = 0.1699, 0.0037, 0.009, 0.0125
"""On one H200, nano-327m, bfloat16, compiled: a step of 16 rows of 2,048 with AdamW (192,878 tokens/s, the lower of two
records of train_gpu), AdamW's part of it, what Muon takes more (188,822 tokens/s, pretrain_curve), and what a rank of a
mesh takes more for each micro-batch though nothing travels (sharded_gpu: 0.928 and 0.937 of the rate, medians)."""
ROW_S = (STEP_S - ADAMW_S) / 16
N, M = 327_007_232, 249_692_160
CORPUS = 9_000_000_000
ROWS, CONTEXT = 256, 2048
"""The step of configs/pretrain/nano-327m.yaml: 524,288 tokens."""
MOST_ROWS = 16
"""Rows of a micro-batch."""
PER_HOST = 8
NVLINK, NETWORK, ETHERNET = 450e9 * 0.8, 50e9 * 0.8, 12.5e9 / PER_HOST * 0.8
"""Bytes/s that one GPU sends: NVLink 4 (900 GB/s both ways, NVIDIA's H200 data sheet), 400 Gb/s InfiniBand for each,
100 Gb/s Ethernet for each host; four fifths of it, which is usual for messages of many megabytes."""
LATENCY_S, MESSAGES = 20e-6, 22
"""For each doubling of the ranks a message takes about this longer; FSDP2 sends one for each block, root and norm."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step on one rank."""

    gpus: int
    rows: int
    """Of each rank."""
    compute: float
    wires: float
    """Messages, if nothing else happened meanwhile."""

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """With nothing hidden, and with all of it."""
        tokens = self.gpus * self.rows * CONTEXT
        return tokens / (self.compute + self.wires), tokens / max(self.compute, self.wires)


def step(gpus: int, parallel: str, rows: int = ROWS, between: float = NETWORK) -> Step:
    """One step of `rows` rows in all."""
    own = rows // gpus
    micro_batches = -(-own // MOST_ROWS)
    compute = own * ROW_S + ADAMW_S + MUON_S + (SHARDED_S * micro_batches if gpus > 1 else 0.0)
    return Step(gpus, own, compute, wires(gpus, parallel, micro_batches, between))


def wires(gpus: int, parallel: str, micro_batches: int, between: float) -> float:
    """Seconds of a rank's messages: gradients once a step in float32, parameters of each pass in bfloat16."""
    if gpus == 1:
        return 0.0
    hosts, local = max(1, gpus // PER_HOST), min(gpus, PER_HOST)
    slowest = NVLINK if hosts == 1 else between
    delay = MESSAGES * LATENCY_S * math.log2(gpus)
    if parallel == "ddp":
        return 2 * 4 * N * share(gpus) / slowest + delay
    passes = 2 * micro_batches  # forward and backward
    gathered = 2 * (N * passes + M)  # Muon needs its matrices whole once more
    if parallel == "fsdp":
        return (gathered + 4 * N) * share(gpus) / slowest + delay * (passes + 1)
    within = (gathered + 4 * N) * share(local) / NVLINK
    return within + 2 * 4 * N / local * share(hosts) / between + delay * (passes + 1)


def share(ranks: int) -> float:
    """What a ring sends of a message: all but one's own part."""
    return (ranks - 1) / ranks


def memory_gb(parallel: str, gpus: int, micro_batches: int) -> float:
    """Weights, gradients and what Muon and AdamW remember, on one rank; activations come on top."""
    parts = {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, PER_HOST)}[parallel]
    remembered = 8 * (N - M) + 4 * M
    whole_gradients = 4 * N if micro_batches > 1 else 0  # FSDP2 adds them up before it cuts them
    held = (4 * N + remembered) / parts + max(whole_gradients, 4 * N / parts)
    return (held + 2 * N) / 1e9  # the compute type, whole at the most


def tables() -> str:
    """The three tables of docs/scaling.md."""
    fixed = [
        "| GPUs | mode | rows each | computes, ms | wires, ms | tokens/s | of ideal | 9 B tokens, hours | state, GB |"
    ]
    fixed += ["|---|---|---|---|---|---|---|---|---|"]
    for gpus, parallel in [(1, "ddp"), (8, "ddp"), (8, "fsdp"), (64, "ddp"), (64, "fsdp"), (64, "hsdp"), (256, "hsdp")]:
        fixed.append(line(step(gpus, parallel), parallel))
    grown = [fixed[0].replace("rows each", "rows in all"), fixed[1]]
    for gpus in (1, 8, 64, 256, 1024):
        parallel = "hsdp" if gpus > PER_HOST else "ddp"
        grown.append(line(step(gpus, parallel, 16 * gpus), parallel, in_all=True))
    slow = [
        "| GPUs | mode | wires at 400 Gb/s a GPU, ms | at 100 Gb/s a host, ms | computes, ms |",
        "|---|---|---|---|---|",
    ]
    for parallel in ("ddp", "fsdp", "hsdp"):
        good, bad = step(64, parallel), step(64, parallel, between=ETHERNET)
        slow.append(f"| 64 | {parallel} | {good.wires * 1e3:.0f} | {bad.wires * 1e3:,.0f} | {good.compute * 1e3:.0f} |")
    return "\n\n".join("\n".join(table) for table in (fixed, grown, slow)) + "\n"


def line(s: Step, parallel: str, *, in_all: bool = False) -> str:
    low, high = s.tokens_per_s
    ideal = s.gpus * step(1, "ddp").tokens_per_s[1]
    state = memory_gb(parallel, s.gpus, -(-s.rows // MOST_ROWS))
    return (
        f"| {s.gpus:,} | {parallel if s.gpus > 1 else 'alone'} | {s.rows * s.gpus if in_all else s.rows:,} | "
        f"{s.compute * 1e3:,.0f} | {s.wires * 1e3:,.0f} | {span(low, high, '{:,.0f}', 1e3)} k | "
        f"{span(100 * low / ideal, 100 * high / ideal, '{:.0f}')} % | "
        f"{span(CORPUS / high / 3600, CORPUS / low / 3600, '{:.2g}')} | {state:.1f} |"
    )


def span(low: float, high: float, form: str, unit: float = 1.0) -> str:
    """Both ends, or one where they look alike."""
    ends = form.format(low / unit), form.format(high / unit)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


if __name__ == "__main__":
    print(tables(), end="")
