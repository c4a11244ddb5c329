"""Pretraining beside what a GPU can do.

Optimizer steps of `nanollm pretrain` (AdamW, bfloat16, compiled) on full batches of random tokens, in turns with the
same model whose Mixtures of Experts are dense networks of equal active width; every turn is several steps. Model FLOPs
utilisation (MFU) counts the model's own operations (ModelConfig.training_flops_per_token) against the dense bfloat16
peak of NVIDIA's data sheet for the SXM part, and against the best product of the model's own shapes, measured in the
same turns. A profile of some steps says where the time goes.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import in_turns, matmul_roof, model_shapes, seconds, spread_of, tell
from benchmarks.train_step import finish, nanollm, shape_of

if TYPE_CHECKING:
    from nanollm.model.config import ModelConfig
    from nanollm.world import World

NEEDS_GPU = True
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}
"""Dense bfloat16, https://www.nvidia.com/en-us/data-center/h200/ (1,979 with sparsity)."""
KINDS = {
    "attention": ("cudnn", "sdpa", "flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "optimizer and casts of all weights": ("multi_tensor", "foreach"),
    "fused by torch.compile": ("triton",),
}
"""What a kernel does, by a part of its name; the rest is `other`."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="turns, in each of which every side is measured once")
    parser.add_argument("--preset", default="nano-327m", help="model of configs/model/")
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="speed.compile")
    parser.add_argument("--without_dense", action="store_true", help="measure the model with experts only")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("this benchmark needs a CUDA device, found none")
    return measured(options)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """On a CPU too, though it says nothing there."""
    import torch

    from nanollm.world import World

    world, c = World.start(), shape_of(options.preset, options.context)
    tokens, flops = options.rows * options.context, c.training_flops_per_token()
    sides = {
        side: steps_of(side, c, world, options) for side in ["experts", *([] if options.without_dense else ["dense"])]
    }
    facts = in_turns(
        {side: lambda run=run: options.steps * tokens / seconds(run) for side, run in sides.items()},  # type: ignore[misc]
        options.repeats,
        roof={"matmul_gflop_per_s": lambda: matmul_roof(model_shapes(c, tokens), world.dtype, world.device.type)},
        warm_up=True,
    )
    is_cuda = world.device.type == "cuda"
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name()) if is_cuda else None
    rates, roofs = facts["sides"]["experts"]["values"], facts["roof"]["matmul_gflop_per_s"]["values"]
    facts = {"unit": "tokens/s", **facts, "flops_per_token": flops}
    if peak:
        facts["mfu"] = spread_of([rate * flops / 1e12 / peak for rate in rates])
    facts["share_of_matmul_roof"] = spread_of([r * flops / 1e9 / most for r, most in zip(rates, roofs, strict=True)])
    if "dense" in sides:
        overhead = [d / e - 1 for e, d in zip(rates, facts["sides"]["dense"]["values"], strict=True)]
        facts["overhead_of_experts"] = spread_of(overhead)
    if is_cuda:
        facts["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        facts["profile_ms_per_step"] = profile(sides["experts"], options.steps)
    return facts


def steps_of(side: str, c: "ModelConfig", world: "World", options: argparse.Namespace) -> Callable[[], None]:
    """Some optimizer steps, until the device has done them."""
    import torch

    from benchmarks.variants import dense

    step = nanollm(c, world, options.compile, dense if side == "dense" else None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(c.vocab_size, (options.rows, options.context + 1), generator=generator).to(world.device)

    def run() -> None:
        for _ in range(options.steps):
            step(ids)
        finish(world)

    return run


def profile(run: Callable[[], None], steps: int) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and its twenty longest kernels; `idle` is when none ran."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    with profiling(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiler:
        wall_ms = 1e3 * seconds(run) / steps
    kernels: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            kernels[event.key] += event.self_device_time_total / 1e3 / steps
    kinds: Counter[str] = Counter()
    for name, ms in kernels.items():
        kinds[next((kind for kind, parts in KINDS.items() if any(p in name.lower() for p in parts)), "other")] += ms
    kinds["idle"] = wall_ms - kinds.total()
    for kind, ms in kinds.most_common():
        tell(f"{kind}: {ms:.1f} ms")
    return {
        "kinds": {kind: round(ms, 2) for kind, ms in kinds.most_common()},
        "kernels": [[name[:120], round(ms, 3)] for name, ms in kernels.most_common(20)],
    }
