"""What is measured is what is said."""

import pytest
import torch

from nanollm.stages import bench
from nanollm.stages.bench import Decoding, Memory, decoding_speed, reading_speed
from tests.model.conftest import TINY


def test_a_step_reads_the_experts_it_meets_and_the_cache_of_its_rows(tiny_model):
    c, per_token = TINY, (TINY.kv_lora_rank + TINY.qk_rope_head_dim) * TINY.n_blocks * 4
    attention = sum(p.numel() for p in tiny_model.trunk.blocks[0].attention.parameters())
    expert = 3 * c.d_model * c.d_expert
    dense = attention + 3 * c.d_model * c.d_ff
    for rows, experts in ((1, 2), (2, 4), (9, 5)):  # top-2 of 5
        moe = attention + (experts + c.n_shared_experts) * expert + c.n_routed_experts * c.d_model
        weights = 2 * (dense + moe) + (2 * 4 + 1) * c.d_model + c.vocab_size * c.d_model  # two of each, norms, head
        decoding = Decoding(tiny_model, rows, context=20, tokens=3)
        assert decoding.bytes_read(tiny_model) == 4 * weights + rows * 20 * per_token


def test_every_step_of_decoding_draws_one_token_of_each_row(tiny_model):
    decoding = Decoding(tiny_model, 3, context=20, tokens=5)
    before = decoding.engine.drawn_tokens
    assert all(decoding.step() > 0 for _ in range(5))
    assert decoding.engine.drawn_tokens - before == 15
    assert {row.num_prompt_tokens for row in decoding.engine.rows} == {20}


def test_the_facts_of_a_measurement_agree_with_each_other(tiny_model, monkeypatch):
    monkeypatch.setattr(bench, "READ_BYTES", 2**20)
    how = {"repeats": 3, "quantize": "none", "kernels": "auto"}
    facts = decoding_speed(tiny_model, Memory(torch.device("cpu")), 2, context=10, tokens=2, **how)
    assert facts["tokens_per_s"]["median"] * facts["ms_per_step"]["median"] == pytest.approx(2e3)
    assert facts["cache_bytes"] == facts["cache_bytes_per_token"] * 2 * (10 + 2 * 3 + 2 + 2)
    first = reading_speed(tiny_model, 30, **how)
    assert first["time_to_first_token_s"]["least"] <= first["time_to_first_token_s"]["greatest"]
