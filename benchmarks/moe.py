"""Cost of a Mixture of Experts, beside a dense SwiGLU of equal active width.

One block of each preset, forward and backward in the compute type of training, in turns: with its Mixture of Experts,
and with a dense SwiGLU of width d_expert * (shared + active). Both multiply a token with the same number of weights but
for the router's; what the block with experts takes longer is its overhead. The router is fresh, and every token
differs. The two feed-forward networks are also measured alone, and then never compiled.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import in_turns, matmul_roof, model_shapes, seconds, spread_of, tell

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.world import World


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=9, help="turns, in each of which every side is measured once")
    parser.add_argument(
        "--presets", nargs="+", default=["nano-327m", "nano-327m-fine"], help="models of configs/model/"
    )
    parser.add_argument("--rows", type=int, default=4, help="sequences")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="speed.compile")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from nanollm.config import load_preset
    from nanollm.model.config import ModelConfig

    presets = {name: ModelConfig(**load_preset("model", name)) for name in options.presets}
    return {name: of_shape(c, options) for name, c in presets.items()}


def of_shape(c: "ModelConfig", options: argparse.Namespace) -> dict[str, Any]:
    """All comparisons for one shape of model."""
    import torch

    from nanollm.train.compile import SpeedConfig, compile_blocks
    from nanollm.world import World

    world, tokens = World.start(), options.rows * options.context
    width = c.d_expert * (c.n_shared_experts + c.experts_per_token)
    models = {"dense": one_block(c, tokens, world, dense_width=width), "experts": one_block(c, tokens, world)}
    for model in models.values():
        compile_blocks(model, SpeedConfig(compile=options.compile), world.device)
    noise = torch.Generator().manual_seed(0)
    ids = torch.randperm(tokens, generator=noise).view(options.rows, -1).to(world.device)
    hidden, gradient = (
        torch.randn(*ids.shape, c.d_model, generator=noise).to(world.device, world.dtype) for _ in range(2)
    )
    hidden.requires_grad_()
    facts: dict[str, Any] = {}
    for part, seen in (("block", ids), ("feed-forward network alone", hidden)):
        tell(f"{part}, ms forward and backward")
        sides = {
            name: both_ways(model.trunk if part == "block" else model.trunk.blocks[0].ffn, seen, gradient, world)
            for name, model in models.items()
        }
        compared = in_turns(sides, options.repeats, warm_up=True)
        overhead = spread_of([ratio - 1 for ratio in compared["ratio"]["experts"]["values"]])
        facts[part] = {"unit": "ms", **compared, "overhead": overhead}
    shapes = [shape for shape in model_shapes(replace(c, d_ff=width), tokens) if shape[2] != c.vocab_size]
    router_weights = c.n_routed_experts * c.d_model
    met = {name: weights_met(model, c) for name, model in models.items()}
    return facts | {
        "roof": {"matmul_gflop_per_s": matmul_roof(shapes, world.dtype, world.device.type)},
        "checks": {
            "weights_per_token": met,
            "same_but_for_the_router": met["experts"] - router_weights == met["dense"],
            "tokens_of_each_expert": next(models["experts"].moe_layers()).load.tolist(),
        },
    }


def one_block(c: "ModelConfig", tokens: int, world: "World", dense_width: int = 0) -> "Transformer":
    """A model of one block: with experts, or with a dense network of `dense_width`; prepared as for training."""
    from nanollm.model.layers import SwiGLU
    from nanollm.model.transformer import Transformer

    model = Transformer(replace(c, n_blocks=1, moe_every=1, n_dense_first=0, vocab_size=tokens))
    if dense_width:
        model.trunk.blocks[0].ffn = SwiGLU(c.d_model, dense_width)
    return model.init(0).to(world.device, world.dtype).train()


def both_ways(module: "nn.Module", seen: "Tensor", gradient: "Tensor", world: "World") -> Callable[[], float]:
    """Milliseconds of one pass forward and backward."""
    import torch

    def work() -> None:
        answer = module(seen)  # of experts with how they were chosen
        (answer[0] if isinstance(answer, tuple) else answer).backward(gradient)
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    def timed() -> float:
        module.zero_grad()
        seen.grad = None
        return 1e3 * seconds(work)

    return timed


def weights_met(model: "Transformer", c: "ModelConfig") -> int:
    """Weights of the block that a token is multiplied with."""
    from nanollm.model.moe import Experts

    block = model.trunk.blocks[0]
    idle = [experts for experts in block.modules() if isinstance(experts, Experts)]
    share = 1 - c.experts_per_token / c.n_routed_experts
    return sum(p.numel() for p in block.parameters()) - sum(
        round(share * p.numel()) for experts in idle for p in experts.parameters()
    )
