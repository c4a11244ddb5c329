"""Which changes to model, optimizer and schedule are compared by ablations.py, and how is each one made?

A variant is made from outside the package: modules are put into a Transformer after it was built, weights are set after
it was drawn, optimizers are replaced. What survives the measurement may become part of the package.
Sources: zero-initialised projections, embedding norm and soft-cap as in https://github.com/KellerJordan/modded-nanogpt
(records 5, 8, 18); value residual arXiv:2410.17897; grouped queries arXiv:2305.13245; Muon's momentum warm-up ditto.
Letters: B rows, T tokens, D model width, H heads, G groups of heads, E width of a head, C key-value latent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from nanollm.data.batches import IGNORE
from nanollm.model.attention import LatentAttention
from nanollm.model.cache import LatentCache
from nanollm.model.config import ModelConfig
from nanollm.model.layers import AttentionMetadata, SwiGLU, rotary_table, rotate
from nanollm.model.moe import MoE
from nanollm.model.transformer import Transformer
from nanollm.train.optim import Muon, OptimConfig, is_hidden_matrix

Change = Callable[[Transformer], None]


def nothing(model: Transformer) -> None:
    """The model as it is."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What optimizers may do beyond OptimConfig. The defaults are the package's own optimizers."""

    embed_lr: float = 1.0
    """Factor on the learning rate of the embedding."""
    head_lr: float = 1.0
    """Factor on the learning rate of the head."""
    momentum_from: float | None = None
    """Muon's momentum begins here and rises linearly to its value; None: it has its value from the start."""
    momentum_steps: int = 100
    """Steps in which it rises."""

    def momentum_at(self, step: int, c: OptimConfig) -> float:
        """Muon's momentum in a step, counted from 0."""
        if self.momentum_from is None:
            return c.momentum
        risen = min(1.0, step / self.momentum_steps)
        return self.momentum_from + (c.momentum - self.momentum_from) * risen


class FactorAdamW(AdamW):
    """AdamW whose groups have a factor on the learning rate that train_step sets anew before every step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["lr_factor"]
        return super().step(closure)


def build_optimizers(masters: Mapping[str, Tensor], c: OptimConfig, t: Tuning, dtype: torch.dtype) -> list[Optimizer]:
    """The package's optimizers, but the embedding and the head are groups with learning rates of their own."""
    with_muon = {n for n, p in masters.items() if c.name == "muon" and is_hidden_matrix(n, p)}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in masters.items():
        if name not in with_muon:
            factor = {"trunk.embed.weight": t.embed_lr, "head.weight": t.head_lr}.get(name, 1.0)
            decay = c.weight_decay if parameter.dim() >= 2 else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    adam_groups = [{"params": ps, "weight_decay": decay, "lr_factor": f} for (f, decay), ps in groups.items()]
    optimizers: list[Optimizer] = [FactorAdamW(adam_groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True)]
    if with_muon:
        matrices = [p for n, p in masters.items() if n in with_muon]
        optimizers.append(Muon(matrices, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, dtype=dtype))
    return optimizers


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table."""

    about: str
    """What is different, in one line."""
    optim: OptimConfig
    against: str | None = None
    """The row that it is compared with."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to the shape of the preset."""
    shape: Change = nothing
    """Puts other modules into the model, before its weights are drawn."""
    start: Change = nothing
    """Sets weights after they were drawn."""
    calls_head: bool = False
    """The head is more than its weight."""
    tuning: Tuning = Tuning()
    batch_size: int = 4
    """Windows per step."""
    pieces: int = 4096
    """Size of the tokenizer."""
    share: float = 1.0
    """Part of the text that is read, of what the other rows read."""
    whole_split: bool = False
    """Measure on the whole validation split too, which alone compares tokenizers."""

    def config(self, preset: Mapping[str, Any], context_length: int) -> ModelConfig:
        """The model's shape."""
        return ModelConfig(**{**preset, "context_length": context_length, "vocab_size": self.pieces, **self.model})

    def build(self, config: ModelConfig, seed: int) -> Transformer:
        """The model before its first step."""
        model = Transformer(config)
        self.shape(model)
        model.init(seed)
        with torch.no_grad():
            self.start(model)
        return model


# Starts


def zero_init(model: Transformer) -> None:
    """What writes to the residual stream, and the head, begin at zero: every block is the identity at first."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj", "head.weight")):
            parameter.zero_()


def zero_init_blocks(model: Transformer) -> None:
    """What writes to the residual stream begins at zero, the head does not."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            parameter.zero_()


def unit_embedding(model: Transformer) -> None:
    """The embedding has standard deviation 1, as its normalised vectors have."""
    embed = model.trunk.embed.weight
    embed.div_(embed.std())


def unit_embedding_zero_init(model: Transformer) -> None:
    """Both."""
    unit_embedding(model)
    zero_init(model)


# Shapes


class NormedEmbedding(nn.Embedding):
    """An embedding whose vectors are divided by their root mean square; folds into the table when it is exported."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.rms_norm(super().forward(tokens), (self.embedding_dim,), eps=1e-6)


def normed_embedding(model: Transformer) -> None:
    model.trunk.embed = NormedEmbedding(model.config.vocab_size, model.config.d_model)


class CappedHead(nn.Linear):
    """Logits that never leave (-cap, cap), arXiv:2408.00118: cap * tanh(logit / cap)."""

    cap = 15.0

    def forward(self, hidden: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().forward(hidden).float() / self.cap)


def head_cross_entropy_sum(head: nn.Linear, hidden: Tensor, targets: Tensor, fuses: bool = False) -> Tensor:
    """What nanollm.train.loss.cross_entropy_sum computes, by calling the head; all logits at once."""
    del fuses  # there is nothing to fuse
    logits = head(hidden.flatten(0, 1)).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def capped_head(model: Transformer) -> None:
    model.head = CappedHead(model.config.d_model, model.config.vocab_size, bias=False)


class ResidualLatentAttention(LatentAttention):
    """Each block after the first moves its key-value latent towards that of the first, by a learned share."""

    def __init__(self, config: ModelConfig, first: list[Tensor], is_first: bool) -> None:
        super().__init__(config)
        self.first, self.is_first = first, is_first  # a list that holds the first block's latent of the pass at hand
        self.share = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, places: AttentionMetadata, cache: LatentCache | None, block: int) -> Tensor:
        assert cache is None, "for training only"
        c = self.config
        q_nope, q_rope = self.queries(x, places.table)
        latent, k_rope = self.kv_a_proj(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_norm(latent)  # (B, T, C)
        if self.is_first:
            self.first[:] = [latent]
        else:
            latent = torch.lerp(latent, self.first[0], self.share)
        k_rope = rotate(k_rope[:, :, None], places.table)[:, :, 0]
        return self.expanded(q_nope, q_rope, latent, k_rope, places.mask)


def value_residual(model: Transformer) -> None:
    first: list[Tensor] = []
    for index, block in enumerate(model.trunk.blocks):
        block.attention = ResidualLatentAttention(model.config, first, index == 0)


def half_shares(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, ResidualLatentAttention):
            module.share.fill_(0.5)


class GroupedAttention(nn.Module):
    """Ordinary attention with rotary positions on whole heads, as in Llama; G = H is multi-head attention."""

    def __init__(self, config: ModelConfig, groups: int, width: int) -> None:
        super().__init__()
        heads, d = config.n_heads, config.d_model
        self.heads, self.groups, self.width, self.theta = heads, groups, width, config.rope_theta
        self.q_proj = nn.Linear(d, heads * width, bias=False)
        self.k_proj = nn.Linear(d, groups * width, bias=False)
        self.v_proj = nn.Linear(d, groups * width, bias=False)
        self.o_proj = nn.Linear(heads * width, d, bias=False)

    def forward(self, x: Tensor, places: AttentionMetadata, cache: LatentCache | None, block: int) -> Tensor:
        assert cache is None, "for training only"
        table = rotary_table(places.positions, self.width, self.theta)
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), table)  # (B, T, H, E)
        k = rotate(self.k_proj(x).unflatten(-1, (self.groups, -1)), table)  # (B, T, G, E)
        v = self.v_proj(x).unflatten(-1, (self.groups, -1))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups < self.heads)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


def grouped_attention(groups: int, width: int) -> Change:
    def change(model: Transformer) -> None:
        for block in model.trunk.blocks:
            block.attention = GroupedAttention(model.config, groups, width)

    return change


def dense(model: Transformer) -> None:
    """Each Mixture of Experts becomes one SwiGLU as wide as the experts that a token meets."""
    c = model.config
    for block in model.trunk.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn = SwiGLU(c.d_model, (c.experts_per_token + c.n_shared_experts) * c.d_expert)


def active_flops_per_token(model: Transformer, context_length: int) -> int:
    """Floating-point operations of training on one token, as ModelConfig.training_flops_per_token counts them."""
    weights, products = sum(p.numel() for p in model.parameters()) - model.trunk.embed.weight.numel(), 0
    for module in model.modules():
        if isinstance(module, MoE):
            c = module.config
            weights -= (c.n_routed_experts - c.experts_per_token) * c.expert_parameters
        elif isinstance(module, LatentAttention):
            products += module.config.n_heads * (module.config.qk_head_dim + module.config.v_head_dim)
        elif isinstance(module, GroupedAttention):
            products += 2 * module.heads * module.width
    return 6 * (weights + products * (context_length // 2))


# The rows, most important first

ADAMW = OptimConfig(name="adamw", lr=1e-3, schedule="cosine", warmup_steps=16, balance_rate=0.01)
MUON = OptimConfig(name="muon", lr=1e-2, schedule="linear", warmup_steps=16, balance_rate=0.01)


def muon(about: str, *, against: str = "muon", optim: Mapping[str, Any] | None = None, **rest: Any) -> Variant:
    """A row that differs from `muon` in what is named."""
    return Variant(about=about, against=against, optim=dataclasses.replace(MUON, **(optim or {})), **rest)


FINE = {"n_routed_experts": 7, "n_shared_experts": 1, "experts_per_token": 2, "norm_topk_prob": True}

ROWS: dict[str, Variant] = {
    "adamw": Variant(about="plain AdamW, cosine to 0: the reference", optim=ADAMW),
    "muon": muon("Muon for the hidden matrices, linear to 0", against="adamw", whole_split=True),
    "zero-init": muon("output projections and head begin at 0", start=zero_init),
    "small-batch": muon("512 tokens per step instead of 1,024", batch_size=2),
    "adamw-small-batch": Variant(about="AdamW, 512 tokens per step", against="adamw", optim=ADAMW, batch_size=2),
    "embed-std-1": muon("embedding begins with standard deviation 1", start=unit_embedding),
    "std-1-zero-init": muon("embed-std-1 and zero-init", start=unit_embedding_zero_init),
    "fast": muon("embed-norm and zero-init", shape=normed_embedding, start=zero_init),
    "adamw-std-1-zero-init": Variant(
        about="AdamW, but the weights of `std-1-zero-init` at the start",
        against="adamw",
        optim=ADAMW,
        start=unit_embedding_zero_init,
    ),
    "dense": muon("dense SwiGLU of 768 for each MoE: equal active FLOPs", shape=dense),
    "mha": muon("multi-head attention, 4 heads of 44: equal parameters", shape=grouped_attention(4, 44)),
    "gqa": muon(
        "grouped-query attention, 4 heads of 58 in 2 groups: 0.2 % fewer parameters", shape=grouped_attention(2, 58)
    ),
    "fine": muon(
        "7 routed (top-2) + 1 shared experts of 128: equal parameters, half of MoE's active FLOPs",
        model={**FINE, "d_expert": 128},
    ),
    "muon-wsd": muon("constant, then linear to 0 in the last fifth", optim={"schedule": "wsd"}),
    "muon-cosine": muon("cosine to 0 instead of linear", optim={"schedule": "cosine"}),
    "value-residual": muon("latents move towards block 0's latent", shape=value_residual, start=half_shares),
    "soft-cap": muon("logits within 15 tanh(x/15)", shape=capped_head, calls_head=True),
    "tokenizer-2048": muon("2,048 pieces, equal bytes of text", pieces=2048, whole_split=True),
    "tokenizer-8192": muon("8,192 pieces, equal bytes of text", pieces=8192, whole_split=True),
    "balance-aux": muon(
        "sequence-wise auxiliary loss (1e-2), no bias", optim={"balance_rate": 0.0, "balance_weight": 1e-2}
    ),
    "balance-none": muon("neither bias nor auxiliary loss", optim={"balance_rate": 0.0}),
    "fine-wide": muon(
        "7 routed (top-2) + 1 shared experts of 256: equal active FLOPs, more parameters",
        model={**FINE, "d_expert": 256},
    ),
    "embed-norm": muon("RMSNorm without weight behind the embedding", shape=normed_embedding),
    "zero-blocks": muon("output projections begin at 0, the head does not", start=zero_init_blocks),
    "momentum": muon(
        "momentum rises from 0.85 in the first half", tuning=Tuning(momentum_from=0.85, momentum_steps=64)
    ),
    "embed-lr-3": muon("3 times the learning rate for the embedding", tuning=Tuning(embed_lr=3.0)),
    "head-lr-third": muon("a third of the learning rate for the head", tuning=Tuning(head_lr=1 / 3)),
    "no-decay": muon("no weight decay", optim={"weight_decay": 0.0}),
    "adamw-linear": Variant(
        about="AdamW, linear to 0", against="adamw", optim=dataclasses.replace(ADAMW, schedule="linear")
    ),
}

SEARCH: dict[str, Variant] = {
    f"{name}-lr-{lr:g}": Variant(about=f"{name}, lr {lr:g}", optim=dataclasses.replace(base, lr=lr), share=0.75)
    for name, base, rates in (("adamw", ADAMW, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)), ("muon", MUON, (5e-3, 1e-2, 2e-2)))
    for lr in rates
}


def wide(about: str, **changes: Any) -> Variant:
    """`std-1-zero-init` with what is named."""
    base = ROWS["std-1-zero-init"]
    changes["optim"] = dataclasses.replace(base.optim, **changes.pop("optim", {}))
    return dataclasses.replace(base, about=f"std-1-zero-init, {about}", against="std-1-zero-init", **changes)


TRIALS: dict[str, Variant] = {
    "std-1-zero-init-small-batch": wide("512 tokens per step", batch_size=2),
    "std-1-zero-init-embed-lr-3": wide("3 times the learning rate for the embedding", tuning=Tuning(embed_lr=3.0)),
    "std-1-zero-init-head-lr-3": wide("3 times the learning rate for the head", tuning=Tuning(head_lr=3.0)),
    "std-1-zero-init-embed-lr-10": wide("10 times the learning rate for the embedding", tuning=Tuning(embed_lr=10.0)),
    "std-1-zero-init-lr-0.005": wide("lr 5e-3", optim={"lr": 5e-3}),
    "std-1-zero-init-lr-0.02": wide("lr 2e-2", optim={"lr": 2e-2}),
    "zero-init-small-batch": muon("zero-init, 512 tokens per step", start=zero_init, batch_size=2),
    "zero-init-adam-lr": muon(
        "zero-init, 512 tokens per step, a quarter of the learning rate for embedding and head",
        start=zero_init,
        batch_size=2,
        tuning=Tuning(head_lr=0.25, embed_lr=0.25),
    ),
}
