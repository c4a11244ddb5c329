"""The KV cache of latent attention: what is kept of the tokens already seen.

Per token and block: the normalised key-value latent and the rotated shared key, nothing else.
Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2.
Letters: L blocks, B rows, S slots, T new tokens, C kv_lora_rank, R rotary width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanollm.model.config import ModelConfig
from nanollm.model.layers import AttentionMetadata

SLOTS = 32
"""The slots that are read are rounded up to a multiple of this, so that few shapes occur: on CPUs a kernel is made
and kept for every shape."""


@dataclass
class LatentCache:
    """The latents of B sequences of different lengths; slot s of a row holds the token at position s."""

    slots: Tensor  # (L, B, S, C + R)
    lengths: Tensor
    """(B,) int64 on the CPU: tokens each row holds. Shorten it to forget; what lies beyond is never read."""
    rows: Tensor | None = None  # (B,) int64: which rows of a larger cache these are; None: all, in order

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        rows: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "LatentCache":
        """Room for `rows` sequences of at most `length` tokens."""
        slots = torch.zeros(config.n_blocks, rows, length, config.cache_width, dtype=dtype, device=device)
        return cls(slots, torch.zeros(rows, dtype=torch.int64))

    def next_positions(self, count: int) -> Tensor:
        """Positions of `count` new tokens in each row: (B, count) int64; ValueError when a row would overflow."""
        if int(self.lengths.max()) + count > self.slots.shape[2]:
            raise ValueError(
                f"the cache has room for {self.slots.shape[2]} tokens per row, got {int(self.lengths.max()) + count}; "
                "make it longer or shorten the prompt"
            )
        return (self.lengths[:, None] + torch.arange(count)).to(self.slots.device)

    def mask(self, positions: Tensor) -> Tensor:
        """Which slots the new tokens at positions (B, T) may look at: (B, T, S') for the S' slots that are read."""
        in_use = int(self.lengths.max()) + positions.shape[1]
        read = min(in_use + -in_use % SLOTS, self.slots.shape[2])
        return torch.arange(read, device=positions.device) <= positions[:, :, None]

    def write(self, block: int, entries: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Store entries (B, T, C + R) at their positions; returns the slots (B, S', C + R) that the mask speaks of."""
        assert metadata.mask is not None, "a cache needs a mask"
        slots, read = self.slots[block], metadata.mask.shape[-1]
        rows = torch.arange(len(entries), device=entries.device) if self.rows is None else self.rows
        slots[rows[:, None], metadata.positions] = entries.to(slots.dtype)
        return slots[:, :read] if self.rows is None else slots[rows, :read]
