"""Mixture of Experts: the router, the routed and shared experts, and their balancing.

Sources: DeepSeek-V3 report, arXiv:2412.19437, section 2.1.2; balancing by bias, arXiv:2408.15664.
Letters: B rows, T tokens, N = B*T tokens flattened, D model width, F expert width, E experts, K experts per token.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.model.config import ModelConfig
from nanollm.model.layers import SwiGLU, swiglu, widened

ROWS = 64  # tokens of one expert are padded to a multiple of this, so that few shapes occur


def route(x: Tensor, centroids: Tensor, bias: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Choose k experts for each token and the weight of each.

    x (N, D) any float; centroids (E, D); bias (E,) float32, steers the choice but never the weight.
    Returns experts (N, K) int64, weights (N, K) and the scores (N, E) they come from, float32 (float64 of float64).
    """
    scores = torch.sigmoid(widened(x) @ widened(centroids).T)  # (N, E)
    experts = (scores.detach() + bias).topk(k, dim=-1).indices  # (N, K)
    weights = scores.gather(-1, experts)  # without the bias
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights, scores


def balance_loss(scores: Tensor, experts: Tensor, is_text: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss, DeepSeek-V3 equations 17 to 20 without the factor alpha.

    scores (B, T, E) before the bias; experts (B, T, K); is_text (B, T), None: all is. Returns (B,): 1 where all experts
    share a sequence equally.
    """
    shares = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter(-1, experts, 1.0)
    counted = torch.ones_like(scores[..., :1]) if is_text is None else is_text[..., None].to(scores.dtype)  # (B, T, 1)
    tokens = counted.sum(1).clamp(min=1)  # (B, 1)
    n_experts, k = scores.shape[-1], experts.shape[-1]
    return ((chosen * counted).sum(1) / tokens * n_experts / k * (shares * counted).sum(1) / tokens).sum(-1)


def dispatch(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Choice c gets the vector of its token: x (N, D) and choices (N*K,) in some order to x[order // K], (N*K, D).

    `inverse` is the inverse of that order: with it the gradient is gathered too, instead of added up one by one.
    """
    vectors: Tensor = Dispatch.apply(x, order, inverse, k)  # type: ignore[no-untyped-call]
    return vectors


class Dispatch(torch.autograd.Function):
    """The two passes of `dispatch`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        by_choice = grad.index_select(0, inverse)
        return sum_of(by_choice.unflatten(0, (-1, ctx.k))), None, None, None


def sum_of(by_choice: Tensor) -> Tensor:
    """(N, K, D) to (N, D). `sum` over so few numbers that lie far apart takes three times as long on a CPU."""
    return functools.reduce(torch.add, by_choice.unbind(1))


class Experts(nn.Module):
    """E SwiGLU networks whose weights lie in three tensors; each computes only the tokens it was given."""

    def __init__(self, n_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.up_proj = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, d_expert))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """x (N, D); experts and weights (N, K); counts (E,), the choices of each. Returns weighted answers (N, D)."""
        k = experts.shape[-1]
        order = experts.flatten().argsort(stable=True)  # (N*K,) choices, expert by expert
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        gathered = dispatch(x, order, inverse, k)  # (N*K, D)
        answers = (self.grouped if self.can_group(gathered) else self.one_by_one)(gathered, counts)
        by_choice = dispatch(answers, inverse, order, 1).unflatten(0, (-1, k))  # (N, K, D)
        return sum_of(by_choice * weights[..., None].to(x.dtype))

    def can_group(self, x: Tensor) -> bool:
        """Whether one product serves all groups: on GPUs, in bfloat16, in rows of a multiple of 16 bytes.

        The sizes of the groups then stay on the device; asking for them makes every layer wait.
        """
        _, f, d = self.gate_proj.shape
        return x.device.type == "cuda" and x.dtype == torch.bfloat16 and d % 8 == 0 and f % 8 == 0

    def grouped(self, gathered: Tensor, counts: Tensor) -> Tensor:
        """Answers (N*K, D) to vectors that stand expert by expert, in one product of groups per matrix."""
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = (
            F.grouped_mm(gathered, weight.transpose(-2, -1), offs=ends) for weight in (self.gate_proj, self.up_proj)
        )
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=ends)

    def one_by_one(self, gathered: Tensor, counts: Tensor) -> Tensor:
        """The same, expert after expert."""
        groups = gathered.split(counts.tolist())
        # Unbound at once: every index into a stack would give a gradient as large as the stack.
        weights = zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        answers = [swiglu(rounded_up(group), *own)[: len(group)] for group, own in zip(groups, weights, strict=True)]
        return torch.cat(answers)


def rounded_up(group: Tensor) -> Tensor:
    """(n, D) with rows of zeros added up to a multiple of ROWS, if there are that many.

    oneDNN makes and keeps a kernel for every shape it meets: with a new number of rows in each step a bfloat16 product
    takes five times as long, and memory grows by half a megabyte each time.
    """
    return F.pad(group, (0, 0, 0, -len(group) % ROWS)) if len(group) > ROWS else group


class Routing(NamedTuple):
    """How the tokens of a pass were routed."""

    experts: Tensor  # (B, T, K) int64
    scores: Tensor  # (B, T, E) float32, with gradient in training


class MoE(nn.Module):
    """Shared experts, which every token passes, plus the chosen routed experts."""

    balance_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.centroids = nn.Parameter(torch.empty(c.n_routed_experts, c.d_model))
        self.experts = Experts(c.n_routed_experts, c.d_model, c.d_expert)
        # n summed SwiGLU networks are one of n times the width.
        self.shared = SwiGLU(c.d_model, c.n_shared_experts * c.d_expert)
        self.register_buffer("balance_bias", torch.zeros(c.n_routed_experts))
        # Tokens per expert since the last call of `balance`; training passes only.
        self.register_buffer("load", torch.zeros(c.n_routed_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, is_text: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (B, T, D) to (B, T, D), and how it was routed. Where is_text (B, T) is false a token counts for no expert's
        load."""
        c = self.config
        flat = x.flatten(0, 1)  # (N, D)
        experts, weights, scores = route(flat, self.centroids, self.balance_bias, c.experts_per_token, c.norm_topk_prob)
        chosen = experts[..., None] == torch.arange(c.n_routed_experts, device=x.device)  # (N, K, E)
        routed = self.experts(flat, experts, weights * c.routed_scaling_factor, chosen.sum((0, 1)))
        if self.training and torch.is_grad_enabled():
            self.load += (chosen if is_text is None else chosen & is_text.flatten()[:, None, None]).sum((0, 1))
        shape = x.shape[:2]
        routing = Routing(experts.view(*shape, c.experts_per_token), scores.view(*shape, c.n_routed_experts))
        return self.shared(x) + routed.view_as(x), routing

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Make overloaded experts a little harder to choose and idle ones easier; start counting anew.

        arXiv:2408.15664, algorithm 1: the bias moves by `rate` in the direction of (mean load - load).
        """
        load = self.load.float()
        self.balance_bias += rate * torch.sign(load.mean() - load)
        self.load.zero_()
