"""Fast = slow: the expanded, cached and absorbed paths give one answer."""

import pytest
import torch

from nanollm.model.attention import LatentAttention
from nanollm.model.cache import LatentCache

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def test_decoding_with_the_cache_equals_one_full_pass(tiny_model, rng):
    tokens = torch.randint(tiny_model.config.vocab_size, (2, 17), generator=rng)
    cache = LatentCache.empty(tiny_model.config, rows=2, length=17)
    steps = [tiny_model(tokens[:, t : t + 1], cache=cache) for t in range(17)]
    torch.testing.assert_close(torch.cat(steps, dim=1), tiny_model(tokens), **CLOSE)


@pytest.mark.parametrize("path", ["expanded", "absorbed"])
@pytest.mark.parametrize("chunks", [[17], [1, 16], [5, 5, 7], [16, 1], [9, 3, 1, 1, 3]], ids=str)
@torch.no_grad()
def test_chunked_prefill_equals_one_full_pass_on_both_paths(tiny_model, rng, monkeypatch, path, chunks):
    limit = 0 if path == "expanded" else 10**9
    monkeypatch.setattr(type(tiny_model.config), "absorbed_is_cheaper_below", limit)
    forbid_other_path(monkeypatch, path)
    tokens = torch.randint(tiny_model.config.vocab_size, (3, 17), generator=rng)
    cache = LatentCache.empty(tiny_model.config, rows=3, length=20)
    logits = torch.cat([tiny_model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)], dim=1)
    monkeypatch.undo()
    torch.testing.assert_close(logits, tiny_model(tokens), **CLOSE)


def forbid_other_path(monkeypatch, path):
    def fail(*_):
        raise AssertionError(f"expected the {path} path only")

    monkeypatch.setattr(LatentAttention, "absorbed" if path == "expanded" else "expanded", fail)


@torch.no_grad()
def test_rows_of_different_lengths_decode_as_if_alone(tiny_model, rng):
    lengths = [3, 11, 7]
    rows = [torch.randint(tiny_model.config.vocab_size, (1, n + 4), generator=rng) for n in lengths]
    padded = torch.zeros(3, max(lengths), dtype=torch.int64)
    for row, (tokens, n) in enumerate(zip(rows, lengths, strict=True)):
        padded[row, :n] = tokens[0, :n]
    cache = LatentCache.empty(tiny_model.config, rows=3, length=16)
    tiny_model(padded, cache=cache)
    cache.lengths = torch.tensor(lengths)  # the padding is forgotten
    for step in range(4):
        new = torch.cat([tokens[:, n + step : n + step + 1] for tokens, n in zip(rows, lengths, strict=True)])
        logits = tiny_model(new, cache=cache)
        for row, (tokens, n) in enumerate(zip(rows, lengths, strict=True)):
            torch.testing.assert_close(logits[row, 0], tiny_model(tokens[:, : n + step + 1])[0, -1], **CLOSE)


@torch.no_grad()
def test_ragged_rows_take_a_chunk_each_at_their_own_place(tiny_model, rng):
    tokens = torch.randint(tiny_model.config.vocab_size, (2, 15), generator=rng)
    cache = LatentCache.empty(tiny_model.config, rows=2, length=15)
    tiny_model(tokens[:, :9], cache=cache)
    cache.lengths = torch.tensor([4, 9])
    chunk = torch.stack((tokens[0, 4:10], tokens[1, 9:15]))
    logits = tiny_model(chunk, cache=cache)
    torch.testing.assert_close(logits[0], tiny_model(tokens[:1, :10])[0, 4:], **CLOSE)
    torch.testing.assert_close(logits[1], tiny_model(tokens[1:])[0, 9:], **CLOSE)


def test_the_cache_holds_latent_and_rotary_key_and_nothing_else(tiny_model):
    c = tiny_model.config
    cache = LatentCache.empty(c, rows=2, length=9)
    tiny_model(torch.zeros(2, 9, dtype=torch.int64), cache=cache)
    assert cache.slots.numel() == c.n_blocks * (2 * 9 + 1) * (c.kv_lora_rank + c.qk_rope_head_dim)


def test_training_keeps_no_cache(tiny_model):
    names = {name for name, _ in tiny_model.named_buffers()}
    assert names == {f"trunk.blocks.{b}.ffn.{buffer}" for b in (1, 3) for buffer in ("balance_bias", "load")}


def test_a_full_cache_refuses_more_tokens(tiny_model):
    cache = LatentCache.empty(tiny_model.config, rows=1, length=4)
    tiny_model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="room for 4 tokens per row, got 5"):
        tiny_model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_the_cheaper_path_is_chosen_by_counting_multiplications(tiny_config):
    c, limit = tiny_config, tiny_config.absorbed_is_cheaper_below
    once = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)

    def expanded(queries):
        return once + queries * (c.qk_head_dim + c.v_head_dim)

    def absorbed(queries):
        return queries * (c.cache_width + c.kv_lora_rank)

    assert absorbed(limit - 1) < expanded(limit - 1)
    assert absorbed(limit) >= expanded(limit)
