"""AdamW, Muon and the learning-rate schedules.

Sources: AdamW arXiv:1711.05101; Muon https://kellerjordan.github.io/posts/muon/, scaled to AdamW's step size as in
arXiv:2502.16982; warm-up-stable-decay arXiv:2404.06395; linear decay to zero arXiv:2502.15938.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nanollm.train.dtensor import gather_full, shard_like, to_local

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MAX_STACK = 2**24
"""Elements of the matrices that Muon orthogonalises together, if they are more than one: together small ones are
faster, and large ones only take more memory."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate and its schedule."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the hidden matrices and AdamW for the rest; adamw: AdamW for everything."""
    lr: float | None = None
    """Peak learning rate, for both optimizers (Muon's step is scaled to the size of AdamW's). null, pretrain only: as
    the width of the model and the tokens of a step have it, which --dry_run says."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """After the warm-up: linear decay, cosine decay, or constant and then linear decay."""
    decay_fraction: float = 0.2
    """wsd only: share of the steps at the end in which the rate decays."""
    final_lr_fraction: float = 0.0
    """Learning rate at which the schedule ends, one step after the last, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay; matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    momentum: float = 0.95
    """Muon's momentum."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm (0: never)."""
    spike_sigmas: float = 0.0
    """Skip an update whose loss is this many standard deviations above the mean of the last 128 (0: never)."""
    balance_rate: float = 1e-3
    """Step of the router's balancing bias after each optimizer step (0: off)."""
    balance_weight: float = 0.0
    """Weight of the sequence-wise balance loss (0: off)."""

    def __post_init__(self) -> None:
        rates = ("lr", "weight_decay", "balance_rate", "balance_weight")
        for name in (*rates, "max_grad_norm", "spike_sigmas", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"optim.{name} must be at least 0, got {value}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"optim.eps must be above 0, got {self.eps}")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"optim.{name} must be at least 0 and below 1, got {value}")
        for name in ("decay_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} must be between 0 and 1, got {getattr(self, name)}")


def default_lr(name: Literal["muon", "adamw"], d_model: int, tokens_per_step: int) -> float:
    """Peak learning rate for pretraining: falls with the width, and with the root of the tokens of small batches.

    Measured at widths of 128 to 384 and 512 to 16,384 tokens a step (docs/log.md); the length of the run hardly
    matters there. AdamW's is an eighth of Muon's (docs/ablations.md: 1e-3, with Muon 5e-3 to 1e-2 at nano-5m).
    """
    lr = 0.02 * 128 / d_model * min(1.0, math.sqrt(tokens_per_step / 4096))
    return float(f"{lr if name == 'muon' else lr / 8:.2g}")


def lr_at(step: int, steps: int, c: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `steps` in all."""
    assert c.lr is not None, "Run.open refuses a run without one"
    warmup = min(1.0, (step + 1) / (c.warmup_steps + 1))
    begin = c.warmup_steps if c.schedule != "wsd" else round(steps * (1 - c.decay_fraction))
    progress = min(1.0, max(0, step - begin) / max(1, steps - begin))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if c.schedule == "cosine" else 1 - progress
    return c.lr * warmup * (c.final_lr_fraction + (1 - c.final_lr_fraction) * remaining)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may orthogonalise it: a matrix, or a stack of them, between two hidden layers."""
    return parameter.dim() >= 2 and not name.endswith(("embed.weight", "head.weight", "centroids"))


def build_optimizers(parameters: Mapping[str, Tensor], c: OptimConfig, dtype: torch.dtype) -> list[Optimizer]:
    """Optimizers over named float32 parameters; `dtype` is what Muon orthogonalises in."""
    with_muon = {n for n, p in parameters.items() if c.name == "muon" and is_hidden_matrix(n, p)}
    rest = {n: p for n, p in parameters.items() if n not in with_muon}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    lr = c.lr or 0.0  # train_step sets that of each step
    optimizers: list[Optimizer] = [AdamW(groups, lr=lr, betas=c.betas, eps=c.eps, fused=True)]
    if with_muon:
        matrices = [p for n, p in parameters.items() if n in with_muon]
        optimizers.append(Muon(matrices, lr=lr, momentum=c.momentum, weight_decay=c.weight_decay, dtype=dtype))
    return optimizers


class Muon(Optimizer):
    """Momentum whose direction is made orthogonal: torch.optim.Muon (match_rms_adamw), but for stacks, and in batches.

    A three-dimensional parameter is a stack of matrices, each orthogonalised for itself. Matrices of the same shape
    go through the Newton-Schulz iteration together.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in _stacks(moving):
                shape = parameters[0].shape[-2:]
                directions = self._directions(parameters, group["momentum"])
                gathered = [gather_full(d, p, group["dtype"]) for d, p in zip(directions, parameters, strict=True)]
                moves = orthogonalise(torch.cat([g.view(-1, *shape) for g in gathered]), group["dtype"])  # (K, M, N)
                sizes = [p.numel() // shape.numel() for p in parameters]
                parts = [
                    shard_like(p, move.view(p.shape)) for p, move in zip(parameters, moves.split(sizes), strict=True)
                ]
                own = [to_local(parameter) for parameter in parameters]
                torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(own, parts, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))

    def _directions(self, parameters: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """Nesterov momentum of the parameters' gradients, as far as this rank holds them."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        grads = [to_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        buffers = [to_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        return torch._foreach_lerp(grads, buffers, momentum)


def _stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters whose matrices have the same shape, with at most MAX_STACK elements together, or a single one."""
    by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        by_shape[parameter.shape[-2:]].append(parameter)
    for alike in by_shape.values():
        stack: list[Tensor] = []
        for parameter in alike:
            if stack and sum(p.numel() for p in stack) + parameter.numel() > MAX_STACK:
                yield stack
                stack = []
            stack.append(parameter)
        yield stack


def orthogonalise(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the nearest orthogonal matrix to each of (K, M, N): five steps of a quintic Newton-Schulz iteration.

    Computed in `dtype`, returned as float32. Singular values end between about 0.7 and 1.2.
    """
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack  # (K, M, N), M <= N
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)).to(dtype)  # first float32: gradients may be tiny
    if 2 * x.shape[-2] < x.shape[-1]:
        # Three steps, then two: with all five from one Gram matrix bfloat16's rounding lets some directions explode.
        x = _several_steps(_several_steps(x, 3), 2)
    else:
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, _polynomial(gram), x, beta=NEWTON_SCHULZ[0])
    return (x.mT if tall else x).float()


def _polynomial(gram: Tensor) -> Tensor:
    """b G + c G^2 of (K, M, M)."""
    _, b, c = NEWTON_SCHULZ
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def _several_steps(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz steps of flat matrices (K, M, N) on their Gram matrices (K, M, M), multiplied with x once.

    With Z = a + b G + c G^2 a step is x -> Z x, so G -> Z G Z: https://dao-lab.ai/blog/2026/gram-newton-schulz
    """
    gram, product = x @ x.mT, None
    for step in range(steps):
        factor = _polynomial(gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(NEWTON_SCHULZ[0])
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ (gram @ factor)
    assert product is not None
    return product @ x
