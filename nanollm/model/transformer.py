"""The Transformer: token ids to logits.

Letters: B rows, T tokens, D model width, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanollm.kernels import attention as fused
from nanollm.model.attention import LatentAttention
from nanollm.model.cache import LatentCache
from nanollm.model.config import ModelConfig
from nanollm.model.layers import AttentionMetadata, CachePlaces, RMSNorm, SwiGLU, rotary_table
from nanollm.model.moe import MoE, Routing

StartName = Literal["gpt2", "fast"]


class Block(nn.Module):
    """Attention, then a dense SwiGLU or a Mixture of Experts, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.attention = LatentAttention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ffn = MoE(config) if config.is_moe(index) else SwiGLU(config.d_model, config.d_ff)

    def forward(
        self, x: Tensor, metadata: AttentionMetadata, cache: LatentCache | None
    ) -> tuple[Tensor, Routing | None]:
        index = 0 if cache is None else self.index  # compiled once, a block serves for all that are built like it
        x = x + self.attention(self.attention_norm(x), metadata, cache, index)
        normed = self.ffn_norm(x)
        out, routing = self.ffn(normed, metadata.is_text) if isinstance(self.ffn, MoE) else (self.ffn(normed), None)
        return x + out, routing


def text_spans(positions: Tensor) -> Tensor:
    """Where in its row each token may look back: from where its text begins to where the part ends that it shares with
    others, and from where its own part begins. positions (B, T) to (B, T, 3) int64.

    A text begins at position 0. Where a position does not follow the one before it, a continuation of the text's first
    tokens begins, up to that position: so the replies to a prompt stand behind it, and none sees another. Whatever the
    positions, 0 <= text <= shared <= own <= the token itself: attention.cpp trusts them.
    """
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    follows = (positions == F.pad(positions[:, :-1] + 1, (1, 0), value=-1)) & (positions != 0)
    text = torch.where(positions == 0, index, 0).cummax(1).values
    own = torch.where(follows, 0, index).cummax(1).values
    shared = torch.minimum(text + positions.gather(1, own).clamp(min=0), own)
    return torch.stack((text, shared, own), dim=-1)


def packed_mask(positions: Tensor) -> Tensor:
    """positions (B, T) as in `text_spans` to (B, T, T): true where a token may look, in its own text and back."""
    text, shared, own = text_spans(positions)[:, :, None].unbind(-1)  # (B, T, 1) each
    key = torch.arange(positions.shape[1], device=positions.device)
    return (((text <= key) & (key < shared)) | (own <= key)).tril()


def is_empty(positions: Tensor) -> Tensor:
    """Which places of packed rows hold no text: (B, T) bool. A text has two tokens or more, an empty place is alone."""
    begins = positions == 0
    ends = F.pad(begins[:, 1:], (0, 1), value=True)  # the next place begins another text
    return begins & ends


class Trunk(nn.Module):
    """Everything but the head: token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_blocks))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)

    def forward(self, tokens: Tensor, cache: LatentCache | None = None, positions: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 to hidden (B, T, D).

        With a cache the tokens continue its rows, and its lengths grow by T. Without one, positions (B, T) say where
        several texts lie in a row, as in `text_spans`: none sees another. None: one text per row.
        """
        return self.routed(tokens, cache, positions)[0]

    def routed(
        self,
        tokens: Tensor,
        cache: LatentCache | None = None,
        positions: Tensor | None = None,
        *,
        places: CachePlaces | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """The same, and how each Mixture of Experts routed the tokens, first block first.

        places: of the tokens in the cache, whose lengths then stay; None: they continue its rows.
        recompute: keep only what enters each block, and compute the rest again in the backward pass.
        """
        count = tokens.shape[1]
        mask = is_text = spans = None
        x = self.embed(tokens)
        is_fused = cache is None and fused.serves(*self.config.head_widths, x.dtype, x.device)
        if cache is not None:
            assert positions is None, "a cache knows where its rows go on"
            places = places or cache.next_places(count)
            positions, mask = places.positions, places.mask
        elif positions is not None:
            is_text = ~is_empty(positions)
            if is_fused:
                spans = text_spans(positions).int()
            else:
                mask = packed_mask(positions)
        else:
            positions = torch.arange(count, device=tokens.device)
        table = rotary_table(positions, self.config.qk_rope_head_dim, self.config.rope_theta)
        metadata = AttentionMetadata(positions, table, mask, is_text, spans, is_fused, places)
        recompute, routings = recompute and torch.is_grad_enabled(), list[Routing]()
        for block in self.blocks:
            if recompute:
                x, routing = checkpoint(block, x, metadata, cache, use_reentrant=False, preserve_rng_state=False)
            elif cache is None:
                x, routing = block(x, metadata, cache)
            else:
                x, routing = block.forward(x, metadata, cache)  # never a compiled one: caches come in too many shapes
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings


class Transformer(nn.Module):
    """The language model. Its head is a module of its own so that the loss can call it in chunks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, cache: LatentCache | None = None, positions: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 to logits (B, T, V); cache and positions as in Trunk."""
        return self.head(self.trunk(tokens, cache, positions))

    def moe_layers(self) -> Iterator[MoE]:
        """The Mixture-of-Experts layers, first block first."""
        return (module for module in self.modules() if isinstance(module, MoE))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode while the block runs, then the mode from before."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    @torch.no_grad()
    def init(self, seed: int, start: StartName = "gpt2") -> "Transformer":
        """Draw every matrix from a normal distribution and set every norm to one; the same seed gives the same bits.

        gpt2: standard deviation sqrt(2 / (5 D)), arXiv:1910.05895; matrices that write to the residual stream are
        smaller by sqrt(2 blocks), as in GPT-2, so that the stream keeps its scale however deep the model is.
        fast: those matrices and the head begin at 0: every block begins as the identity (docs/ablations.md).
        """
        generator = torch.Generator().manual_seed(seed)
        std = math.sqrt(2 / (5 * self.config.d_model))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            scale = std / math.sqrt(2 * self.config.n_blocks) if writes_to_stream else std
            if start == "fast" and (writes_to_stream or name == "head.weight"):
                scale = 0.0
            # Drawn on the CPU so that every device starts from the same bits.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return self
