"""LoRA: low-rank adapters of a frozen model, put on its weights from outside.

Source: arXiv:2106.09685, section 4.1. Where a weight W is used stands W + alpha / R * B A: A is drawn, B begins at 0,
so training begins at the base itself. The sum is made in each forward pass, so experts, absorbed attention and kernels
see an ordinary weight, and what is trained is what a merged model computes; W itself has no gradient.
Letters: M outputs, N inputs, R rank, E experts.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer

Pair = tuple[Tensor, Tensor]
"""A (R, N) and B (M, R), or stacks of them, of which one may be for all; the scale is within B."""
Pairs = Mapping[str, Pair]
"""An adapter in use, by the plain names of the weights."""
TARGETS = (
    *("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train an adapter (LoRA, arXiv:2106.09685) and leave the model as it is, its routers' balance included."""

    rank: int | None = None
    """Rank of the adapter of each matrix, such as 16; null: no adapter, every weight is trained."""
    alpha: float = 32.0
    """The adapter's product counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: [*TARGETS])
    """Matrices with an adapter, by the ends of their names: gate_proj means that of dense, shared and routed experts,
    experts.gate_proj that of routed ones alone, each of which has its own; centroids are the routers."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, or null to train every weight, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be above 0, got {self.alpha}")
        if self.rank is None and (self.alpha, self.targets) != (32.0, [*TARGETS]):
            raise ValueError("lora.alpha and lora.targets need an adapter; set --lora.rank, such as 16")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        assert self.rank is not None
        return self.alpha / self.rank


Adapter = tuple[LoraConfig, dict[str, Tensor]]
"""Settings and weights of an adapter, these by plain names of the base's and .lora_A or .lora_B behind them."""


class Lora(nn.Module):
    """The adapter of a matrix (M, N), or of each of a stack (E, M, N)."""

    def __init__(self, weight: Tensor, c: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert c.rank is not None
        *stack, outputs, inputs = weight.shape
        drawn = torch.randn(*stack, c.rank, inputs, generator=generator) * inputs**-0.5
        self.lora_A = nn.Parameter(drawn.to(weight))
        self.lora_B = nn.Parameter(torch.zeros(*stack, outputs, c.rank).to(weight))
        self.scale, self.is_on = c.scale, True

    def forward(self, weight: Tensor) -> Tensor:
        return adapted(weight, self.lora_A, self.lora_B, self.scale) if self.is_on else weight


def adapted(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A: weight (M, N), a (R, N), b (M, R), or stacks of them; rounded once."""
    return (torch.addmm if weight.dim() == 2 else torch.baddbmm)(weight, b, a, alpha=scale)


def add_lora(model: Transformer, c: LoraConfig, seed: int) -> None:
    """Freeze a model and put adapters on it; nothing without a rank. The same seed gives the same bits."""
    if c.rank is None:
        return
    names, generator = targeted(model, c.targets), torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in names:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        register_parametrization(module, own, Lora(getattr(module, own), c, generator), unsafe=True)


def targeted(model: Transformer, targets: Sequence[str]) -> list[str]:
    """Names of the matrices that the targets mean; ValueError for one that means none."""
    found, matrices = set[str](), [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    for target in targets:
        hits = {name for name in matrices if f".{name.removesuffix('.weight')}".endswith(f".{target}")}
        if not hits:
            known = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in matrices})
            raise ValueError(f"lora.targets: no matrix of this model is called {target}; it has {', '.join(known)}")
        found |= hits
    if not found:
        raise ValueError("lora.targets must name at least one matrix, got none")
    return [name for name in matrices if name in found]


def adapters(model: nn.Module) -> list[Lora]:
    """All of a model; none where every weight is trained."""
    return [module for module in model.modules() if isinstance(module, Lora)]


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The base, while the block runs: no adapter counts."""
    for each in (own := adapters(model)):
        each.is_on = False
    assert own, "a model without an adapter is its own base"
    try:
        yield
    finally:
        for each in own:
            each.is_on = True


def plain_name(name: str) -> str:
    """A tensor of a model with adapters by the name of the base's, and behind it .lora_A or .lora_B of its adapter."""
    return re.sub(r"\.parametrizations\.(\w+)\.(?:original|0)", r".\1", name)


def pairs_of(model: nn.Module, weights: Mapping[str, Tensor], scale: float) -> Pairs:
    """A trained adapter in use beside others, in float32; ValueError if this model has no place for it."""
    own, pairs = dict(model.named_parameters()), dict[str, Pair]()
    for name in dict.fromkeys(name.rpartition(".")[0] for name in weights):
        if name.endswith(("centroids", "embed.weight")):
            raise ValueError(f"it adapts {name}, which only a merged model can; make one with nanollm merge")
        weight, a, b = own.get(name), weights.get(f"{name}.lora_A"), weights.get(f"{name}.lora_B")
        if weight is None or a is None or b is None or weight.dim() < 2 or a.dim() < 2:
            raise ValueError(f"it has no whole pair for a matrix {name} of the model; copy the adapter again")
        *stack, outputs, inputs = weight.shape
        if a.shape != (*stack, rank := a.shape[-2], inputs) or b.shape != (*stack, outputs, rank):
            shapes = ", ".join(str(tuple(each.shape)) for each in (a, b, weight))
            raise ValueError(f"A and B do not fit {name}: {shapes}; copy the adapter again")
        pairs[name] = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32) * scale
    return pairs


@contextmanager
def with_pairs(model: nn.Module, pairs: Pairs) -> Iterator[None]:
    """W + B A in place of each W, while the block runs."""
    own = dict(model.named_parameters())
    kept = {name: own[name].data for name in pairs}
    for name, (a, b) in pairs.items():
        own[name].data = adapted(kept[name], a.to(kept[name]), b.to(kept[name]), 1.0)
    try:
        yield
    finally:
        for name, weight in kept.items():
            own[name].data = weight


def stacked(pairs: Sequence[Pair | None], weights: Sequence[Tensor]) -> Pair | None:
    """The pair of matrices that stand on one another: their A on one another, their B along the diagonal."""
    if not any(pairs):
        return None
    found = [pair or (weight[:0], weight[:, :0]) for pair, weight in zip(pairs, weights, strict=True)]
    return torch.cat([a for a, _ in found]), torch.block_diag(*(b for _, b in found))


def per_head(pair: Pair | None, c: ModelConfig) -> dict[str, Pair]:
    """A pair of kv_b_proj as those of its parts: W_uk + B_uk A both ways, and W_uv + B_uv A."""
    if pair is None:
        return {}
    a, b = pair  # (R, C) and (H * (N + V), R)
    b_uk, b_uv = b.unflatten(0, (c.n_heads, -1)).split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
    return {"key_up": (b_uk.mT, a.T), "key_down": (a, b_uk), "value_up": (a, b_uv)}


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the base and of an adapter, by plain names, to those of one model; in the adapter's type."""
    found = {name: tensor for name, tensor in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name in weights.keys() - found.keys():
        base, _, which = name.rpartition(".")
        if which == "lora_A":
            a, b = weights[name], weights[f"{base}.lora_B"]
            found[base] = adapted(found[base].to(a.dtype), a, b, scale)
    return found
