"""Multi-Head Latent Attention: causal attention whose keys and values are kept as one small latent per token.

Multi-Head Latent Attention, DeepSeek-V3 report, arXiv:2412.19437, section 2.1.1; the absorbed form follows
arXiv:2405.04434, section 2.1.2: W_uk moves into the query, W_uv behind the attention, and the latent itself is key
and value of all heads.
Letters: B rows, T queries, S keys, D model width, H heads, Q query latent, C key-value latent,
N width without position, R rotary width, V value width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.kernels import attention as fused
from nanollm.model.cache import LatentCache
from nanollm.model.config import ModelConfig
from nanollm.model.layers import AttentionMetadata, RMSNorm, rotate


class LatentAttention(nn.Module):
    """Expanded attention for training and long prompts, absorbed attention for decoding; both give the same answer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.q_a_proj = nn.Linear(c.d_model, c.q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.n_heads * c.qk_head_dim, bias=False)  # rows per head: N, R
        self.kv_a_proj = nn.Linear(c.d_model, c.cache_width, bias=False)  # rows: C, R
        self.kv_a_norm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.v_head_dim, c.d_model, bias=False)
        self.scale = c.qk_head_dim**-0.5

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: LatentCache | None, block: int) -> Tensor:
        """x (B, T, D) to (B, T, D). Without a cache S is T; with one it is the number of slots that the mask covers."""
        c, table, mask = self.config, metadata.table, metadata.mask
        q_nope, q_rope = self.queries(x, table)  # (B, T, H, N) and (B, T, H, R)
        latent, k_rope = self.kv_a_proj(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_norm(latent)  # (B, T, C)
        k_rope = rotate(k_rope[:, :, None], table)[:, :, 0]  # (B, T, R): one key for all heads
        if metadata.is_fused:
            return self.fused(q_nope, q_rope, latent, k_rope, metadata.spans)
        if cache is None:
            return self.expanded(q_nope, q_rope, latent, k_rope, mask)

        assert mask is not None
        entries = cache.write(block, torch.cat((latent, k_rope), dim=-1), metadata)  # (B, S, C + R)
        if x.shape[1] < c.absorbed_is_cheaper_below:
            return self.absorbed(q_nope, q_rope, entries, mask)
        latent, k_rope = entries.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return self.expanded(q_nope, q_rope, latent, k_rope, mask)

    def queries(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x (B, T, D) to the parts without position (B, T, H, N) and with it (B, T, H, R)."""
        c = self.config
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))).unflatten(-1, (c.n_heads, c.qk_head_dim))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, table)

    def expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of every head are made from the latents (B, S, C), then ordinary attention.

        mask (B, T, S), true where a query may look; None means causal over T = S tokens. Returns (B, T, D).
        """
        c = self.config
        kv = self.kv_b_proj(latent).unflatten(-1, (c.n_heads, -1))  # (B, S, H, N + V)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # (B, H, T, N + R)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, c.n_heads, -1)), dim=-1).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v.transpose(1, 2),
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            scale=self.scale,
        )  # (B, H, T, V)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def fused(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, spans: Tensor | None) -> Tensor:
        """What `expanded` computes, where every token looks at its own text; spans (B, T, 3) as in `text_spans`."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.config.n_heads, -1))  # (B, T, H, N + V)
        out, _ = fused.attend(torch.cat((q_nope, q_rope), dim=-1), kv, k_rope, spans, self.scale)
        return self.o_proj(out.flatten(-2))

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor) -> Tensor:
        """All heads attend to the cache entries (B, S, C + R) themselves; no key or value is ever made.

        mask (B, T, S), true where a query may look. Returns (B, T, D).
        """
        c = self.config
        up = self.kv_b_proj.weight.unflatten(0, (c.n_heads, -1))  # (H, N + V, C)
        w_uk, w_uv = up.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
        q = torch.cat((q_latent, q_rope), dim=-1).flatten(1, 2)  # (B, T*H, C + R)
        entries = entries.to(q.dtype)
        scores = (q @ entries.transpose(1, 2)).float() * self.scale  # (B, T*H, S)
        scores = scores.unflatten(1, (-1, c.n_heads)).masked_fill(~mask[:, :, None], -torch.inf)
        probabilities = scores.softmax(dim=-1).flatten(1, 2).to(q.dtype)
        mixed = (probabilities @ entries[..., : c.kv_lora_rank]).unflatten(1, (-1, c.n_heads))  # (B, T, H, C)
        return self.o_proj(torch.einsum("bthc,hvc->bthv", mixed, w_uv).flatten(-2))
