"""A model whose dense blocks were placed in Mixtures of Experts is the same model."""

from dataclasses import replace

import pytest
import torch

from nanollm.bundle import build_model
from nanollm.config import load_preset, preset_names
from nanollm.export.dense_to_moe import Placement, dense_to_moe, moe_to_dense, pairs_to_moe
from nanollm.model.config import ModelConfig
from nanollm.model.lora import targeted
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

TOP_1 = replace(TINY, n_routed_experts=3, experts_per_token=1, norm_topk_prob=False)
SHAPES = {  # TINY: 2 shared experts 24 wide, 2 of 5 routed, normalised
    "into the shared expert": replace(TINY, d_ff=40),
    "into the shared expert, which they fill": replace(TINY, d_ff=48),
    "into two routed experts too": TINY,  # 72
    "into all that is active": replace(TINY, d_ff=96),
    "scaled": replace(TINY, routed_scaling_factor=2.0),
    "top-1": replace(TOP_1, d_ff=60),
    "into a wider shared expert": replace(TINY, d_ff=97),
    "into a wider one, because thirds are not exact": replace(TINY, experts_per_token=3),
    "after dense blocks": replace(TINY, n_blocks=6, moe_every=1, n_dense_first=2),
}


def moved(shape: ModelConfig, dtype: torch.dtype = torch.float32):
    """A model, where its blocks go, and its weights there."""
    model = randomised(Transformer(shape).init(0)).eval().to(dtype)
    placement = Placement.of(shape)
    return model, placement, dense_to_moe(model.state_dict(), placement)


def model_of(shape: ModelConfig, weights) -> Transformer:
    model = build_model(shape)
    model.load_state_dict(weights, assign=True)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_the_placed_model_has_the_same_logits(shape, rng):
    model, placement, weights = moved(shape)
    tokens = torch.randint(shape.vocab_size, (2, 33), generator=rng)
    placed = model_of(placement.after, weights)
    torch.testing.assert_close(placed(tokens), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_placed_can_be_taken_back_bit_by_bit(shape, dtype):
    model, placement, weights = moved(shape, dtype)
    taken = moe_to_dense(weights, placement)
    assert taken.keys() == model.state_dict().keys()
    assert all(torch.equal(taken[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["down_proj", "o_proj", "centroids"]])
def test_adapters_are_placed_as_their_weights_are(shape, targets, rng):
    """W + B A placed is W placed, and B A placed."""
    model, placement, weights = moved(shape)
    pairs = {}
    for name in targeted(model, targets):
        *stack, outputs, inputs = model.get_parameter(name).shape
        pairs[name] = [torch.randn(*stack, *size, generator=rng) for size in ((3, inputs), (outputs, 3))]
    summed = {
        name: tensor + pairs[name][1] @ pairs[name][0] for name, tensor in model.state_dict().items() if name in pairs
    }
    expected = dense_to_moe(model.state_dict() | summed, placement)
    placed = pairs_to_moe(pairs, placement)
    assert placed.keys() <= expected.keys()
    for name, tensor in expected.items():
        found = weights[name] + placed[name][1] @ placed[name][0] if name in placed else weights[name]
        torch.testing.assert_close(found, tensor)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dense_blocks_are_left_at_the_front_only(shape):
    after = Placement.of(shape).after
    kinds = [after.is_moe(block) for block in range(after.n_blocks)]
    assert kinds == sorted(kinds)
    assert after.n_dense_before_moe == shape.n_dense_before_moe


@pytest.mark.parametrize("shape", [SHAPES["into the shared expert"], TINY], ids=["zeros", "split"])
def test_weights_that_were_trained_on_cannot_be_taken_back(shape):
    _, placement, weights = moved(shape)
    name = "trunk.blocks.2.ffn.experts.up_proj"
    weights[name] = weights[name].clone()
    weights[name][-1, -1, -1] += 1e-3
    with pytest.raises(ValueError, match="was changed since"):
        moe_to_dense(weights, placement)


def test_nano_327m_fine_costs_no_arithmetic():
    fine = ModelConfig(**load_preset("model", "nano-327m-fine"))
    after, routers = Placement.of(fine).after, 12 * fine.n_routed_experts * fine.d_model
    assert after.active_parameters == fine.active_parameters + routers


@pytest.mark.parametrize("name", preset_names("model"))
def test_no_preset_has_more_blocks_placed_than_those_behind_the_first_mixture(name):
    shape = ModelConfig(**load_preset("model", name))
    placement = Placement.of(shape)
    assert placement.after.n_shared_experts == shape.n_shared_experts
    assert placement.after.n_moe_blocks == shape.n_blocks - 3
