"""Small shapes in which every size differs, so that a swapped dimension cannot hide."""

import pytest
import torch

from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=97,
    context_length=64,
    d_model=40,
    n_blocks=4,
    n_heads=3,
    q_lora_rank=28,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    d_ff=72,
    moe_every=2,
    n_routed_experts=5,
    n_shared_experts=2,
    experts_per_token=2,
    d_expert=24,
    norm_topk_prob=True,
)


def randomised(model: Transformer) -> Transformer:
    """Norm weights and router biases as a trained model might have them, where init leaves ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter *= 2
        for layer in model.moe_layers():
            layer.balance_bias += 0.2 * torch.randn(layer.balance_bias.shape, generator=generator)
    return model


@pytest.fixture
def tiny_config() -> ModelConfig:
    return TINY


@pytest.fixture
def tiny_model() -> Transformer:
    return randomised(Transformer(TINY).init(0)).eval()


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
