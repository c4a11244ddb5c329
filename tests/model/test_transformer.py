"""Laws of the whole model, its initialisation and its arithmetic."""

import dataclasses
import math

import pytest
import torch

from nanollm.config import load_preset, preset_names
from nanollm.model.config import ModelConfig
from nanollm.model.layers import rotary_table, rotate
from nanollm.model.transformer import Transformer, packed_mask, text_spans
from tests.model.conftest import TINY

SIZES = {
    "nano-1m": 1_206_016,
    "nano-5m": 5_608_640,
    "nano-20m": 20_948_608,
    "nano-60m": 59_656_704,
    "nano-327m": 327_007_232,
    "nano-327m-fine": 327_026_432,
}


@torch.no_grad()
def test_a_token_does_not_change_the_logits_before_it(tiny_model, rng):
    tokens = torch.randint(tiny_model.config.vocab_size, (1, 20), generator=rng)
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % tiny_model.config.vocab_size
    model = tiny_model.double()  # in float32 processors differ in how products of other sizes are rounded
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@torch.no_grad()
def test_logits_depend_on_the_order_of_earlier_tokens(tiny_model):
    tokens = torch.tensor([[5, 6, 7, 8]])
    swapped = torch.tensor([[6, 5, 7, 8]])
    assert not torch.allclose(tiny_model(tokens)[:, -1], tiny_model(swapped)[:, -1], atol=1e-4)


def test_a_continuation_sees_what_it_continues_and_itself():
    """Two texts and an empty place; behind the first two tokens of the second stand two continuations."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 2, 0]])
    seen = [[0], [0, 1], [0, 1, 2], [3], [3, 4], [3, 4, 5], [3, 4, 5, 6], [3, 4, 7], [8]]
    assert [row.nonzero().flatten().tolist() for row in packed_mask(positions)[0]] == seen


def test_whatever_the_positions_no_token_looks_before_its_row_or_behind_itself(rng):
    positions = torch.randint(-3, 6, (200, 24), generator=rng)
    text, shared, own = text_spans(positions).unbind(-1)
    for earlier, later in ((torch.zeros_like(text), text), (text, shared), (shared, own), (own, torch.arange(24))):
        assert bool((earlier <= later).all())


@torch.no_grad()
def test_continuations_behind_one_prompt_equal_texts_of_their_own(tiny_model, rng):
    model = tiny_model.double()
    prompt, *replies = (torch.randint(model.config.vocab_size, (length,), generator=rng) for length in (5, 4, 1, 6))
    positions = [torch.arange(5), *(torch.arange(5, 5 + len(reply)) for reply in replies)]
    together = model(torch.cat((prompt, *replies))[None], positions=torch.cat(positions)[None])[0]
    place = 5
    for reply in replies:
        alone = model(torch.cat((prompt, reply))[None])[0]
        torch.testing.assert_close(together[place : place + len(reply)], alone[5:], rtol=0, atol=1e-12)
        place += len(reply)


def test_rotation_makes_products_depend_on_distance_alone(rng):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=rng)

    def product(query_at, key_at):
        tables = [rotary_table(torch.tensor([at]), 16, 10_000.0) for at in (query_at, key_at)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", preset_names("model"))
def test_every_preset_has_its_stated_size_by_counting_and_by_formula(name):
    config = ModelConfig(**load_preset("model", name))
    with torch.device("meta"):
        model = Transformer(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == config.total_parameters == SIZES[name]


@pytest.mark.parametrize("name", preset_names("model"))
def test_active_parameters_leave_out_idle_experts_and_other_embedding_rows(name):
    config = ModelConfig(**load_preset("model", name))
    idle = (config.n_routed_experts - config.experts_per_token) * 3 * config.d_model * config.d_expert
    unused = config.n_moe_blocks * idle + (config.vocab_size - 1) * config.d_model
    assert config.active_parameters == config.total_parameters - unused


def test_initialisation_reaches_every_matrix_and_is_scaled(tiny_config):
    model = Transformer(dataclasses.replace(tiny_config, vocab_size=4096, d_ff=512, d_expert=256)).init(0)
    std = math.sqrt(2 / (5 * tiny_config.d_model))
    small = std / math.sqrt(2 * tiny_config.n_blocks)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            expected = small if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")) else std
            error = 4 * expected / math.sqrt(2 * parameter.numel())  # four standard errors
            assert abs(parameter.std().item() - expected) < error, name


def test_initialisation_is_a_function_of_the_seed(tiny_config):
    first, same, other = (Transformer(tiny_config).init(seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_bfloat16_stays_close_to_float32(tiny_config, rng):
    model = Transformer(tiny_config).init(0).eval()
    tokens = torch.randint(tiny_config.vocab_size, (2, 20), generator=rng)
    with torch.no_grad():
        expected = model(tokens)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        got = model(tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().mean() < 0.01 * expected.std()


def test_the_fast_start_begins_with_blocks_that_change_nothing_and_a_head_without_opinion(rng):
    model = Transformer(TINY).init(0, "fast")
    tokens = torch.randint(TINY.vocab_size, (2, 9), generator=rng)
    torch.testing.assert_close(model.trunk(tokens), model.trunk.norm(model.trunk.embed(tokens)))
    assert not model(tokens).any()
    plain = Transformer(TINY).init(0)
    assert torch.equal(*(each.trunk.embed.weight for each in (model, plain)))
    assert torch.equal(*(each.trunk.blocks[0].attention.q_a_proj.weight for each in (model, plain)))
