"""The model's shape, and the parameters and arithmetic that follow from it.

Source: DeepSeek-V3 report, arXiv:2412.19437, section 2.1, for the attention and the experts; Llama 4 for one
Mixture of Experts in every fourth block.
"""

import math
from dataclasses import dataclass, fields

MAX_VOCAB_SIZE = 65_536  # token files hold uint16
MAX_SIZE, MAX_PARAMETERS = 2**20, 10**13  # a config.json of others is built from


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Transformer with Multi-Head Latent Attention and a Mixture of Experts in every n-th block."""

    vocab_size: int
    """Rows of the embedding and of the untied head (at most 65,536)."""
    context_length: int
    """Longest sequence, in tokens."""
    d_model: int
    """Width of the residual stream."""
    n_blocks: int
    """Number of blocks, dense and Mixture of Experts together."""
    n_heads: int
    """Attention heads per block."""
    q_lora_rank: int
    """Width of the query latent."""
    kv_lora_rank: int
    """Width of the key-value latent: what the cache holds, beside the rotary key."""
    qk_nope_head_dim: int
    """Width per head of queries and keys without position."""
    qk_rope_head_dim: int
    """Width of the rotary part of a query, and of the one rotary key that all heads share (even)."""
    v_head_dim: int
    """Width per head of values."""
    d_ff: int
    """Hidden width of the dense SwiGLU."""
    moe_every: int = 4
    """Every n-th block is a Mixture of Experts (blocks n, 2n, ... counted from 1)."""
    n_dense_first: int = 0
    """Number of first blocks that are always dense; with moe_every 1, DeepSeek-V3's first_k_dense_replace."""
    n_routed_experts: int
    """Experts the router chooses from."""
    n_shared_experts: int
    """Experts that process every token; their outputs are summed."""
    experts_per_token: int
    """Routed experts per token (top-k)."""
    d_expert: int
    """Hidden width of one expert."""
    norm_topk_prob: bool
    """Normalize the weights of the chosen experts to sum to 1. Must be false for top-1, where it would silence the
    router."""
    routed_scaling_factor: float = 1.0
    """Factor on the sum of the routed experts' outputs."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm; 1e-6 is what every engine assumes for the latents."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.type is int and f.name != "n_dense_first"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise ValueError(f"model.{name} must be from 1 to {MAX_SIZE:,}, got {getattr(self, name):,}")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"model.vocab_size must be at most {MAX_VOCAB_SIZE:,} (token files hold uint16), got {self.vocab_size}"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"model.qk_rope_head_dim must be even (rotary pairs), got {self.qk_rope_head_dim}")
        if self.n_blocks < self.moe_every:
            raise ValueError(
                f"model.n_blocks must be at least model.moe_every ({self.moe_every}) to hold a Mixture of Experts, "
                f"got {self.n_blocks}"
            )
        last_moe = self.n_blocks // self.moe_every * self.moe_every
        if not 0 <= self.n_dense_first < last_moe:
            raise ValueError(
                f"model.n_dense_first must be from 0 to {last_moe - 1} so that a Mixture of Experts is left, "
                f"got {self.n_dense_first}"
            )
        if self.experts_per_token > self.n_routed_experts:
            raise ValueError(
                f"model.experts_per_token must be at most model.n_routed_experts ({self.n_routed_experts}), "
                f"got {self.experts_per_token}"
            )
        if self.norm_topk_prob and self.experts_per_token == 1:
            raise ValueError(
                "model.norm_topk_prob must be false with model.experts_per_token 1: "
                "a normalised single weight is always 1 and the router would learn nothing"
            )
        for name in ("routed_scaling_factor", "rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"model.{name} must be a positive number, got {value}")
        if self.rms_norm_eps >= 1:
            raise ValueError(f"model.rms_norm_eps must be below 1, got {self.rms_norm_eps}")
        if self.total_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"the sizes of the model make {self.total_parameters:,} parameters; look at model.d_model, "
                f"model.n_blocks, model.n_heads, model.d_ff, model.d_expert and the numbers of experts"
            )

    def is_moe(self, block: int) -> bool:
        """Whether block number `block`, counted from 0, is a Mixture of Experts."""
        return (block + 1) % self.moe_every == 0 and block >= self.n_dense_first

    @property
    def n_dense_before_moe(self) -> int:
        """Dense blocks before the first Mixture of Experts."""
        return next(block for block in range(self.n_blocks) if self.is_moe(block))

    @property
    def n_moe_blocks(self) -> int:
        return self.n_blocks // self.moe_every - self.n_dense_first // self.moe_every

    @property
    def head_widths(self) -> tuple[int, int, int]:
        """Of each head: without position, rotary, value."""
        return self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers the cache holds per token and block."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def absorbed_is_cheaper_below(self) -> int:
        """Number of new tokens under which absorbed attention takes fewer multiplications than expanded attention.

        Per key and head, expanding costs kv_lora_rank * (nope + v) once and (nope + rope + v) per query; absorbed
        attention costs (2 kv_lora_rank + rope) per query and nothing once.
        """
        once = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        saved_per_query = self.cache_width + self.kv_lora_rank - self.qk_head_dim - self.v_head_dim
        return self.context_length + 1 if saved_per_query <= 0 else math.ceil(once / saved_per_query)

    @property
    def attention_parameters(self) -> int:
        """Weights of one block's attention, the norms of its latents included."""
        queries = self.d_model * self.q_lora_rank + self.q_lora_rank * self.n_heads * self.qk_head_dim
        keys_values = self.d_model * self.cache_width
        keys_values += self.kv_lora_rank * self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        norms = self.q_lora_rank + self.kv_lora_rank
        return queries + keys_values + self.n_heads * self.v_head_dim * self.d_model + norms

    @property
    def expert_parameters(self) -> int:
        return 3 * self.d_model * self.d_expert

    @property
    def total_parameters(self) -> int:
        """Every trained number of the model."""
        moe = (self.n_routed_experts + self.n_shared_experts) * self.expert_parameters
        moe += self.n_routed_experts * self.d_model  # router
        dense = 3 * self.d_model * self.d_ff
        blocks = self.n_blocks * (self.attention_parameters + 2 * self.d_model)
        blocks += self.n_moe_blocks * moe + (self.n_blocks - self.n_moe_blocks) * dense
        return blocks + 2 * self.vocab_size * self.d_model + self.d_model

    @property
    def active_parameters(self) -> int:
        """Numbers a token meets: one embedding row, the chosen experts, everything else."""
        idle_experts = (self.n_routed_experts - self.experts_per_token) * self.expert_parameters
        return self.total_parameters - self.n_moe_blocks * idle_experts - (self.vocab_size - 1) * self.d_model

    @property
    def multiplied_parameters(self) -> int:
        """Weights that a token is multiplied with: all active ones but its embedding row."""
        return self.active_parameters - self.d_model

    def training_flops_per_token(self) -> int:
        """Floating-point operations of one token at full context, forward and backward (three times the forward).

        Two per weight, and two per query-key and attention-value product; a causal query sees half the context.
        """
        products = self.n_blocks * self.n_heads * (self.qk_head_dim + self.v_head_dim) * (self.context_length // 2)
        return 6 * (self.multiplied_parameters + products)

    def decoding_flops_per_token(self, context: int) -> int:
        """Floating-point operations of one token decoded with absorbed attention after `context` others."""
        products = self.n_blocks * self.n_heads * (self.cache_width + self.kv_lora_rank) * context
        return 2 * (self.multiplied_parameters + products)
