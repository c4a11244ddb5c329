"""Tokens per second of one optimizer step, beside transformers and beside plain float32.

Same weights, same tokens, AdamW and clipped gradients on all sides:
    transformers    Glm4MoeLiteForCausalLM, float32 weights under bfloat16 autocast, sdpa, its own loss, fused AdamW
    float32 eager   our model uncompiled in float32, all logits at once, AdamW: how the original trained on a CPU
    nanollm         a step of `nanollm pretrain`
Every turn of a side is a process of its own, because two do not fit into the memory of a small machine, and its peak
memory is measured with it: it takes one step to warm up, of one sequence many times, and one that is timed. What this
machine multiplies in the shapes of the model is measured in each turn; the share of it counts the model's own
operations (ModelConfig.training_flops_per_token) and nothing that is computed twice.
"""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.measuring import (
    ROOT,
    compared,
    in_turns,
    matmul_roof,
    memory_gb,
    model_shapes,
    peak_memory_gb,
    seconds,
    spread_of,
    tell,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.world import World

LEARNING_RATE, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 1e-4, 0.1, (0.9, 0.95), 1.0
TOLERANCE = 0.01  # nats: what computing in bfloat16 may change of a mean loss

Compile = Literal["auto", "on", "off"]
Step = Callable[[Any], float]
"""One optimizer step on ids (B, T + 1), of which each predicts the next; its mean loss in nats."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="nano-327m", help="model of configs/model/")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), help="leave some out")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="speed.compile of ours")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from nanollm.world import World

    c, dtype = shape_of(options.preset, options.context), World.start().dtype
    tokens, flops = options.rows * options.context, c.training_flops_per_token()
    seen: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}

    def turn(side: str) -> float:
        seen[side].append(in_a_process(side, options))
        return tokens / seen[side][-1]["seconds"]

    def column(side: str, name: str) -> list[float]:
        return [each[name] for each in seen[side]]

    def roof() -> float:
        return matmul_roof(model_shapes(c, tokens), dtype, World.start().device.type)

    facts = in_turns(
        {side: lambda side=side: turn(side) for side in options.sides},  # type: ignore[misc]
        options.repeats,
        roof={"matmul_gflop_per_s": roof},
    )
    rates = {side: facts["sides"][side]["values"] for side in options.sides}
    roofs = facts["roof"]["matmul_gflop_per_s"]["values"]
    others = [side for side in ("float32 eager", "nanollm") if side in rates]
    first_losses = {side: seen[side][0]["first_loss"] for side in options.sides}
    losses = {side: seen[side][0]["loss"] for side in options.sides}
    return {
        "unit": "tokens/s",
        **facts,
        "to_float32_eager": {"unit": "tokens/s", **compared({side: rates[side] for side in others})} if others else {},
        "share_of_matmul_roof": {
            side: spread_of([rate * flops / 1e9 / most for rate, most in zip(rates[side], roofs, strict=True)])
            for side in options.sides
        },
        "flops_per_token": flops,
        "peak_memory": {"unit": "GB", **compared({side: column(side, "peak_gb") for side in options.sides})},
        "peak_memory_without_imports": {
            "unit": "GB",
            **compared({side: column(side, "peak_without_imports_gb") for side in options.sides}),
        },
        "checks": {
            "loss_of_the_same_weights": first_losses,
            "loss_after_one_step": losses,
            "same": max(max(each.values()) - min(each.values()) for each in (first_losses, losses)) < TOLERANCE,
            "tolerance": TOLERANCE,
        },
    }


def shape_of(preset: str, context: int) -> "ModelConfig":
    from nanollm.config import load_preset
    from nanollm.model.config import ModelConfig

    return dataclasses.replace(ModelConfig(**load_preset("model", preset)), context_length=context)


def in_a_process(side: str, options: argparse.Namespace) -> dict[str, float]:
    """What `one_turn` says, in a process that does nothing else."""
    words = [side, options.preset, str(options.rows), str(options.context), options.compile]
    command = [sys.executable, "-m", "benchmarks.train_step", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{side} ended with status {done.returncode} (-9: no memory): {done.stderr.strip()[-500:]}")
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    tell(f"{side}: " + ", ".join(f"{name} {value:.5g}" for name, value in facts.items()))
    return facts


# --- inside the process of one side ---


def one_turn(side: str, preset: str, rows: int, context: int, compile: Compile = "auto") -> dict[str, float]:
    """A step to warm up and one that is timed, and the peak memory of both."""
    import torch

    from nanollm.world import World

    for module in IMPORTS[side]:
        importlib.import_module(module)
    imports_gb, begun = memory_gb(), time.perf_counter()
    world, c = World.start(), shape_of(preset, context)
    ids = torch.randint(c.vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0)).to(world.device)
    step = nanollm(c, world, compile) if side == "nanollm" else SIDES[side](c, world)
    # A whole batch: the first step of a size also pays for its kernels and for memory that nobody has touched yet.
    first_loss = step(ids[:1].expand(rows, -1))
    finish(world)
    prepared, losses = time.perf_counter(), []

    def timed() -> None:
        losses.append(step(ids))
        finish(world)

    elapsed = seconds(timed)
    on_gpu = world.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else peak_memory_gb()
    facts = {"seconds": elapsed, "first_loss": first_loss, "loss": losses[0], "preparation_s": prepared - begun}
    return facts | {"peak_gb": peak, "peak_without_imports_gb": peak - (0 if on_gpu else imports_gb)}


def finish(world: "World") -> None:
    """Wait for the device."""
    if world.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def nanollm(
    c: "ModelConfig",
    world: "World",
    compile: Compile = "auto",
    change: "Callable[[Transformer], None] | None" = None,
) -> Step:
    """As `nanollm pretrain` does it; `change` may put other modules into the model."""
    from nanollm.data.batches import Batch
    from nanollm.model.transformer import Transformer
    from nanollm.train.compile import SpeedConfig, compile_blocks
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState
    from nanollm.train.step import train_step

    optim = OptimConfig(name="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    model = Transformer(c)
    if change:
        change(model)
    state = TrainState.start(model.init(0).to(world.device), optim, world)
    compile_blocks(state.model, SpeedConfig(compile=compile), world.device)

    def step(ids: "Tensor | Batch") -> float:
        batch = ids if isinstance(ids, Batch) else Batch(ids[:, :-1], ids[:, 1:])
        return train_step(
            state,
            [batch],
            lambda model, batch: next_token_loss(model, batch, optim.balance_weight),
            LEARNING_RATE,
            optim,
            world,
        ).loss

    return step


def transformers(c: "ModelConfig", world: "World") -> Step:
    """Its class and its own loss; autocast where ours computes in a short type, too."""
    import torch

    from benchmarks.peers import transformers_twin
    from nanollm.model.transformer import Transformer

    peer = transformers_twin(Transformer(c).init(0)).to(world.device).train()
    optimizer = torch.optim.AdamW(
        peer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True
    )
    is_short = world.dtype != torch.float32

    def step(ids: "Tensor") -> float:
        targets = ids[:, 1:].contiguous()
        with torch.autocast(world.device.type, world.dtype, enabled=is_short):
            # The targets are the next tokens already: the class need not shift them.
            loss = peer(ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
        return update(loss, optimizer)

    return step


def float32_eager(c: "ModelConfig", world: "World") -> Step:
    """Nothing but PyTorch: float32, all logits at once."""
    import torch
    from torch.nn import functional as F

    from nanollm.model.transformer import Transformer

    model = Transformer(c).init(0).to(world.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)

    def step(ids: "Tensor") -> float:
        logits = model(ids[:, :-1])
        return update(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), optimizer)

    return step


def update(loss: "Tensor", optimizer: "Optimizer") -> float:
    """Backward, clip, move the weights."""
    import torch

    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


SIDES: dict[str, Callable[["ModelConfig", "World"], Step]] = {
    "transformers": transformers,
    "float32 eager": float32_eager,
    "nanollm": nanollm,
}

IMPORTS = {
    "transformers": ("torch._dynamo", "benchmarks.peers"),
    "float32 eager": ("torch._dynamo", "nanollm.model.transformer"),
    "nanollm": ("torch._dynamo", "nanollm.train.step", "nanollm.train.loss", "nanollm.train.compile"),
}
"""What a side has loaded before its memory is looked at the first time; optimizers load torch._dynamo."""

if __name__ == "__main__":
    print(json.dumps(one_turn(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))  # type: ignore[arg-type]
