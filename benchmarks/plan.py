"""How near is what `nanollm plan` says to what a training step takes, in memory and in time?

    python benchmarks/run.py plan                measures, on CPUs (ten minutes on two cores)
    python -m benchmarks.plan                    writes the tables of docs/planning.md from the newest record, and says
                                                 which rates (nanollm/train/forecast.py) its fitted cases ask for

Each case is a process of its own that takes real steps (train_step) of random tokens: the peak of its resident memory,
and the median of its steps after those that warm up. Before each case this machine is measured as the planner measures
it; what is predicted follows from the medians of that. Cases that the planner's rates were fitted to are marked; the
others were looked at afterwards.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.measuring import ROOT, memory_gb, peak_memory_gb, seconds, spread_of, tell

if TYPE_CHECKING:
    from nanollm.model.config import ModelConfig
    from nanollm.train.forecast import Layout
    from nanollm.train.machines import Machine

PAGE = ROOT / "docs" / "planning.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of step."""

    preset: str
    sequences: int
    micro_batches: int = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    recompute: bool = False
    dtype: Literal["auto", "float32"] = "auto"

    def tokens(self, c: "ModelConfig") -> int:
        """Of a step."""
        return self.sequences * self.micro_batches * c.context_length

    @property
    def name(self) -> str:
        words = [self.preset, f"{self.sequences} sequences"]
        words += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        words += [self.optimizer] if self.optimizer != "muon" else []
        words += ["recompute"] if self.recompute else []
        return ", ".join([*words, *([self.dtype] if self.dtype != "auto" else [])])


FITTED = (
    Case(preset="nano-5m", sequences=2),
    Case(preset="nano-5m", sequences=16),
    Case(preset="nano-60m", sequences=1),
    Case(preset="nano-60m", sequences=4),
)
CHECKED = (
    Case(preset="nano-1m", sequences=8),
    Case(preset="nano-1m", sequences=32),
    Case(preset="nano-5m", sequences=8),
    Case(preset="nano-5m", sequences=4, micro_batches=4),
    Case(preset="nano-20m", sequences=1),
    Case(preset="nano-20m", sequences=4),
    Case(preset="nano-20m", sequences=8),
    Case(preset="nano-20m", sequences=2, micro_batches=4),
    Case(preset="nano-20m", sequences=4, optimizer="adamw"),
    Case(preset="nano-20m", sequences=4, recompute=True),
    Case(preset="nano-20m", sequences=4, dtype="float32"),
    Case(preset="nano-60m", sequences=2),
    Case(preset="nano-60m", sequences=1, micro_batches=4),
    Case(preset="nano-327m", sequences=1),
    Case(preset="nano-327m", sequences=2),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", default=[], help="cases of these only (default: all)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timed steps in each case, three steps at least")
    parser.set_defaults(repeats=1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cases = [case for case in (*FITTED, *CHECKED) if not options.presets or case.preset in options.presets]
    looked: dict[str, list[dict[str, float]]] = {"auto": [], "float32": []}
    seen: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for _ in range(options.repeats):
        for case in cases:
            looked[case.dtype].append(look(case.dtype))
            seen[case.name].append(in_a_process(case, options.seconds))
            tell(f"{case.name}: {seen[case.name][-1]}; the machine: {looked[case.dtype][-1]}")
    return {
        "unit": "tokens/s, GB (1e9 bytes), of a whole process",
        "roof": {
            dtype: {name: spread_of([each[name] for each in found]) for name in found[0]}
            for dtype, found in looked.items()
            if found
        },
        "cases": {
            case.name: {
                "case": asdict(case),
                "is_fitted": case in FITTED,
                "tokens_per_s": spread_of([rate for each in seen[case.name] for rate in each["rates"]]),
                "peak_gb": spread_of([each["peak_gb"] for each in seen[case.name]]),
                "libraries_gb": spread_of([each["libraries_gb"] for each in seen[case.name]]),
            }
            for case in cases
        },
    }


def look(dtype: str) -> dict[str, float]:
    """What the planner measures of this machine."""
    from nanollm.machine import measure_gemm
    from nanollm.train.machines import measure_moving, measure_norm
    from nanollm.world import World

    world = World.start("cpu", dtype)  # type: ignore[arg-type]
    return {
        "gflop_per_s": measure_gemm(world.device, world.dtype),
        "gb_per_s": measure_moving(world.device),
        "norm_gb_per_s": measure_norm(world.device, world.dtype),
    }


def in_a_process(case: Case, limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan", json.dumps(asdict(case) | {"limit_s": limit_s})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{case.name} ended with status {done.returncode} (-9: no memory): {done.stderr[-500:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


# --- inside the process of a case ---


def one_case(limit_s: float, **settings: Any) -> dict[str, Any]:
    """Tokens/s of some steps, and the peak of this process."""
    import torch

    from nanollm.data.batches import Batch
    from nanollm.model.transformer import Transformer
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState
    from nanollm.train.step import train_step
    from nanollm.world import World

    case, libraries = Case(**settings), memory_gb()
    c, optim, world = model_of(case.preset), OptimConfig(name=case.optimizer), World.start("cpu", case.dtype)
    model = Transformer(c).init(0)
    model.trunk.recompute = case.recompute
    state = TrainState.start(model, optim, world)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(case.micro_batches):
        ids = torch.randint(c.vocab_size, (case.sequences, c.context_length + 1), generator=generator)
        batches.append(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))

    def step() -> None:
        train_step(state, batches, next_token_loss, 1e-3, optim, world)

    if seconds(step) < limit_s / 2:
        step()  # kernels are made for the shapes of the first steps
    times, begun = list[float](), time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < limit_s:
        times.append(seconds(step))
    return {"rates": [case.tokens(c) / each for each in times], "peak_gb": peak_memory_gb(), "libraries_gb": libraries}


def model_of(preset: str) -> "ModelConfig":
    from nanollm.model.config import ModelConfig
    from nanollm.settings import load_preset

    return ModelConfig(**load_preset("model", preset))


# --- what the planner says of it ---


def predicted(case: Case, roof: Mapping[str, Any]) -> tuple[float, float]:
    """Tokens/s, and GB at the peak, on a machine that was measured so."""
    from nanollm.train.forecast import memory_of, tokens_per_s
    from nanollm.train.machines import BESIDE

    c, machine = model_of(case.preset), machine_of(case, roof)
    layout = layout_of(case)
    peak = memory_of(c, machine, layout, case.optimizer).total + BESIDE["cpu"]
    return tokens_per_s(c, machine, layout, case.optimizer), peak / 1e9


def machine_of(case: Case, roof: Mapping[str, Any]) -> "Machine":
    import torch

    from nanollm.model import fused
    from nanollm.train.machines import Machine

    is_short = case.dtype == "auto"  # on a machine whose own type is bfloat16, as that of the record is
    dtype = torch.bfloat16 if is_short else torch.float32
    return Machine(
        name="of the record",
        kind="cpu",
        memory=0,
        tflops=roof[case.dtype]["gflop_per_s"]["median"] / 1e3,
        gb_per_s=roof[case.dtype]["gb_per_s"]["median"],
        norm_gb_per_s=roof[case.dtype]["norm_gb_per_s"]["median"],
        dtype="bfloat16" if is_short else "float32",
        is_fused=fused.fits(model_of(case.preset), dtype, torch.device("cpu")),
    )


def layout_of(case: Case) -> "Layout":
    from nanollm.train.forecast import Layout

    return Layout(sequences=case.sequences, micro_batches=case.micro_batches, recompute=case.recompute)


def fitted_rates(record: Mapping[str, Any]) -> dict[str, float]:
    """The rates of forecast.RATES that come nearest to the fitted cases of a record, by relative squares."""
    import numpy as np

    from nanollm.train.forecast import RATES, work_of

    rows, rest = [], []
    for facts in record["cases"].values():
        case = Case(**facts["case"])
        if case not in FITTED:
            continue
        c, machine = model_of(case.preset), machine_of(case, record["roof"])
        work, tokens = work_of(c, machine, layout_of(case), case.optimizer), case.tokens(c)
        assert machine.tflops and machine.norm_gb_per_s and machine.gb_per_s
        taken = tokens / facts["tokens_per_s"]["median"]
        products = work.flops / machine.tflops / 1e12
        once = work.small / RATES["cpu"].traffic / machine.norm_gb_per_s / 1e9
        rows.append([products / taken, once / taken, work.calls / taken])
        rest.append(1 - work.moved / machine.gb_per_s / 1e9 / taken)
    inverse, traffic, call_s = np.linalg.lstsq(np.array(rows), np.array(rest), rcond=None)[0]
    return {"products": 1 / inverse, "traffic": traffic, "call_s": call_s}


# --- docs/planning.md ---


def newest(pattern: str) -> dict[str, Any]:
    """The newest record of a kind. ValueError if there is none."""
    files = sorted(RESULTS.glob(pattern))  # names begin with the date
    if not files:
        raise ValueError(f"there is no {pattern} in benchmarks/results: run python benchmarks/run.py plan")
    record: dict[str, Any] = json.loads(files[-1].read_bytes())
    return record


def section() -> str:
    """The tables of the page, by the formulas as they are now."""
    record = newest("*-cores_plan.json")
    roof, machine = record["roof"], record["hardware"]
    roofs = "; ".join(
        f"{'bfloat16' if dtype == 'auto' else dtype} {shown(found['gflop_per_s'])} GFLOP/s, "
        f"{shown(found['gb_per_s'], 1)} GB/s moved, {shown(found['norm_gb_per_s'], 1)} GB/s by a norm"
        for dtype, found in roof.items()
    )
    lines = [
        f"{record['date']}, commit {record['commit']}, {machine['cores']} cores ({machine['processor']}), torch "
        f"{record['versions']['torch']}. What the planner measured of the machine, before each case: {roofs}.",
        "",
        "| step | GB at the peak: said | taken | off by | tokens/s: said | taken | off by | rates |",
        "|---|---|---|---|---|---|---|---|",
        *(cpu_line(name, facts, roof) for name, facts in record["cases"].items()),
        "",
        "| one H200, nano-327m | said | measured | off by |",
        "|---|---|---|---|",
        *(f"| {what} | {said:,.4g} | {taken:,.4g} | {off(said, taken)} |" for what, said, taken in gpu_points()),
    ]
    return "\n".join(lines)


def cpu_line(name: str, facts: Mapping[str, Any], roof: Mapping[str, Any]) -> str:
    rate, peak = predicted(Case(**facts["case"]), roof)
    taken, held = facts["tokens_per_s"], facts["peak_gb"]["median"]
    return (
        f"| {name} | {peak:.2f} | {held:.2f} | {off(peak, held)} | {rate:,.0f} | {shown(taken)} | "
        f"{off(rate, taken['median'])} | {'fitted' if facts['is_fitted'] else ''} |"
    )


def gpu_points() -> list[tuple[str, float, float]]:
    """What was measured, what the planner says of it, and what was taken; from the records of an H200."""
    from nanollm.train.forecast import Layout, memory_of, tokens_per_s
    from nanollm.train.machines import GPUS

    c, h200 = model_of("nano-327m"), GPUS["h200"]
    trained, sharded, curve = (newest(f"*h200_{name}.json") for name in ("train_gpu", "sharded_gpu", "pretrain_curve"))

    def rate(sequences: int, optimizer: Literal["muon", "adamw"]) -> float:
        return tokens_per_s(c, h200, Layout(sequences=sequences, micro_batches=1), optimizer)

    n = c.total_parameters
    step = memory_of(c, h200, Layout(sequences=16, micro_batches=1), "adamw").total / 1e9
    # Beside the model that trains these records hold others: a dense one with weights, copies and moments; meshes' own.
    routed = c.n_routed_experts * (c.expert_parameters + c.d_model) - c.experts_per_token * c.expert_parameters
    dense = (6 + 8) * (n - c.n_moe_blocks * routed) / 1e9
    meshes = (6 + 8 + 4 + 8) * n / 1e9
    return [
        ("tokens/s, 16 sequences, AdamW (train_gpu)", rate(16, "adamw"), trained["sides"]["experts"]["median"]),
        ("tokens/s, the same, another day (sharded_gpu)", rate(16, "adamw"), sharded["sides"]["alone"]["median"]),
        ("tokens/s, 32 sequences, Muon, real text (pretrain_curve)", rate(32, "muon"), curve["tokens_per_s"]["median"]),
        ("GB, 16 sequences, AdamW, beside a dense twin (train_gpu)", step + dense, trained["peak_memory_gb"]),
        ("GB, 16 sequences, AdamW, beside two others (sharded_gpu)", step + meshes, sharded["peak_gb"]),
    ]


def off(said: float, taken: float) -> str:
    return f"{100 * (said / taken - 1):+.0f} %"


def shown(spread: Mapping[str, float], digits: int = 0) -> str:
    return f"{spread['median']:,.{digits}f} ({spread['least']:,.{digits}f} to {spread['greatest']:,.{digits}f})"


def write_page() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    page = f"{before}{BEGIN}\n{section()}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(page, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(one_case(**json.loads(sys.argv[1]))))
    else:
        write_page()
        print(fitted_rates(newest("*-cores_plan.json")))
