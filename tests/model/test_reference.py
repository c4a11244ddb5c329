"""Ours = the reference: transformers' own classes, with our weights copied into them."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3MoE

from benchmarks.peers import reference_settings, reference_weights
from nanollm.model.layers import AttentionMetadata, rotary_table
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

TOP_1 = dataclasses.replace(TINY, n_routed_experts=2, experts_per_token=1, norm_topk_prob=False, n_shared_experts=1)
ALL_MOE = dataclasses.replace(TINY, moe_every=1, routed_scaling_factor=2.0)


def load(module: nn.Module, weights: dict[str, Tensor], prefix: str = "") -> nn.Module:
    module.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    return module.eval()


@torch.no_grad()
def test_latent_attention_equals_deepseek_v3(tiny_model, rng):
    c, block = TINY, tiny_model.trunk.blocks[0]
    config = DeepseekV3Config(**reference_settings(c))
    theirs = load(
        DeepseekV3Attention(config, 0), reference_weights(tiny_model.state_dict(), TINY), "model.layers.0.self_attn."
    )
    x = torch.randn(2, 17, c.d_model, generator=rng)
    positions = torch.arange(17)
    cos, sin = rotary_table(positions, c.qk_rope_head_dim, c.rope_theta)
    rotary = tuple(torch.cat((part, part), dim=-1)[None].expand(2, -1, -1) for part in (cos, sin))
    mask = torch.full((17, 17), -torch.inf).triu(1)[None, None].expand(2, -1, -1, -1)
    expected, _ = theirs(x, position_embeddings=rotary, attention_mask=mask)
    got = block.attention(x, AttentionMetadata(positions, (cos, sin), mask=None, is_text=None), None, 0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mixture_of_experts_equals_deepseek_v3(tiny_model, rng):
    theirs = load(
        DeepseekV3MoE(DeepseekV3Config(**reference_settings(TINY))),
        reference_weights(tiny_model.state_dict(), TINY),
        "model.layers.1.mlp.",
    )
    x = torch.randn(3, 11, TINY.d_model, generator=rng)
    torch.testing.assert_close(tiny_model.trunk.blocks[1].ffn(x)[0], theirs(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_whole_model_equals_deepseek_v3(rng):
    ours = randomised(Transformer(ALL_MOE).init(0)).eval()
    config = DeepseekV3Config(**reference_settings(ALL_MOE), first_k_dense_replace=0)
    theirs = load(DeepseekV3ForCausalLM(config), reference_weights(ours.state_dict(), ALL_MOE))
    tokens = torch.randint(ALL_MOE.vocab_size, (2, 33), generator=rng)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("c", [TINY, TOP_1], ids=["top-2 normalised", "top-1"])
@torch.no_grad()
def test_whole_model_with_dense_and_expert_blocks_equals_glm_4_moe_lite(c, rng):
    ours = randomised(Transformer(c).init(0)).eval()
    layers = ["sparse" if c.is_moe(index) else "dense" for index in range(c.n_blocks)]
    theirs = load(
        Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**reference_settings(c), mlp_layer_types=layers)),
        reference_weights(ours.state_dict(), c),
    )
    tokens = torch.randint(c.vocab_size, (2, 33), generator=rng)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_reference(rng):
    ours = randomised(Transformer(TINY).init(0))
    layers = ["sparse" if TINY.is_moe(index) else "dense" for index in range(TINY.n_blocks)]
    theirs = load(
        Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**reference_settings(TINY), mlp_layer_types=layers)),
        reference_weights(ours.state_dict(), TINY),
    )
    tokens = torch.randint(TINY.vocab_size, (2, 33), generator=rng)
    for model in (ours, theirs):
        logits = model(tokens)
        (logits if isinstance(logits, Tensor) else logits.logits).logsumexp(-1).mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradients |= {name: torch.zeros_like(buffer) for name, buffer in ours.named_buffers()}  # those have none
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    got = reference_weights(gradients, TINY)
    assert expected.keys() == {name for name in got if "correction_bias" not in name}
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
