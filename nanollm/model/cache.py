"""The KV cache of latent attention: what is kept of the tokens already seen.

Per token and block: the normalised key-value latent and the rotated shared key, nothing else.
Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2.
Letters: L blocks, B rows, S slots, T new tokens, C kv_lora_rank, R rotary width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanollm.model.config import ModelConfig
from nanollm.model.layers import AttentionMetadata, CachePlaces

SLOTS = 32
"""The slots that are read are rounded up to a multiple of this, so that few shapes occur: on CPUs a kernel is made
and kept for every shape."""


@dataclass
class LatentCache:
    """The latents of B sequences of different lengths; slot s of a row holds the token at position s."""

    slots: Tensor  # (L, B * S + 1, C + R): row after row, and a slot for what nobody reads
    length: int  # S
    lengths: Tensor
    """(B,) int64 on the CPU: tokens each row holds. Shorten it to forget; what lies beyond is never read."""

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
        slots = torch.zeros(config.n_blocks, rows * length + 1, config.cache_width, dtype=dtype, device=device)
        return cls(slots, length, torch.zeros(rows, dtype=torch.int64))

    @property
    def rows(self) -> Tensor:
        """(L, B, S, C + R), without the slot that nobody reads."""
        return self.slots[:, :-1].unflatten(1, (-1, self.length))

    def next_places(self, count: int) -> CachePlaces:
        """Places of `count` more tokens in each row, which then holds them; ValueError when one would overflow."""
        if (in_use := int(self.lengths.max()) + count) > self.length:
            raise ValueError(
                f"the cache has room for {self.length} tokens per row, got {in_use}; "
                "make it longer or shorten the prompt"
            )
        rows, device = torch.arange(len(self.lengths))[:, None], self.slots.device
        positions = (self.lengths[:, None] + torch.arange(count)).to(device)
        self.lengths += count
        return self.places(positions, rows.to(device) * self.length + positions, in_use)

    def places(self, positions: Tensor, targets: Tensor, in_use: int, rows: Tensor | None = None) -> CachePlaces:
        """Places of tokens at positions (B, T) whose slots are `targets` (B, T), in rows that hold `in_use` at most."""
        read = min(in_use + -in_use % SLOTS, self.length)
        mask = torch.arange(read, device=positions.device) <= positions[:, :, None]
        return CachePlaces(positions, targets.flatten(), mask, rows)

    def write(self, block: int, entries: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Store entries (B, T, C + R) at their places; returns the slots (B, S', C + R) that the mask speaks of."""
        assert metadata.places is not None, "a cache needs places"
        slots, read, rows = self.slots[block], metadata.places.mask.shape[-1], metadata.places.rows
        slots.index_copy_(0, metadata.places.targets, entries.flatten(0, 1).to(slots.dtype))
        held = slots[:-1].unflatten(0, (-1, self.length))[:, :read]
        return held[: len(entries)] if rows is None else held[rows]
