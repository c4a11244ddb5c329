from itertools import product

import numpy as np
import pytest
import torch

from nanollm.data.batches import IGNORE, Windows, sequential_batches
from nanollm.data.prepare import Part, Rules, prepare
from nanollm.data.shards import Shards

T = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory, documents, tokenizer):
    folder = tmp_path_factory.mktemp("shards")
    rules = Rules(kind="text", val_fraction=0.0, shard_tokens=300)
    prepare([Part(lambda on_bad: documents)], tokenizer, folder, rules, source={})
    return Shards.open(folder, tokenizer_fingerprint=tokenizer.fingerprint)


def test_inputs_and_targets_are_one_window_shifted_by_one(shards):
    (batch,) = Windows(shards, T, seed=0).micro_batches(3, 4, 4)
    assert batch.tokens.shape == batch.targets.shape == (4, T)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens[:, 1:].equal(batch.targets[:, :-1])
    assert batch.count == 4 * T


@pytest.mark.parametrize(("world", "micros"), [(1, 2), (1, 12), (2, 1), (2, 3), (3, 4), (12, 1)])
def test_ranks_and_micro_batches_share_the_one_rank_batch_in_its_order(shards, world, micros):
    windows = Windows(shards, T, seed=5)
    for step in range(4):
        (whole,) = windows.micro_batches(step, 12, 12)
        size = 12 // (micros * world)
        by_rank = [windows.micro_batches(step, 12, size, rank=rank, world=world) for rank in range(world)]
        pieces = [by_rank[rank][micro] for micro, rank in product(range(micros), range(world))]
        assert torch.cat([piece.tokens for piece in pieces]).equal(whole.tokens)
        assert torch.cat([piece.targets for piece in pieces]).equal(whole.targets)


def test_an_epoch_reads_every_window_exactly_once(shards):
    windows = Windows(shards, T, seed=1)
    whole = torch.from_numpy(shards.read(0, windows.windows * T + 1).astype(np.int64))
    expected = sorted(whole[:-1].view(-1, T).tolist())
    for epoch in (0, 1):
        steps = range(epoch * windows.windows, (epoch + 1) * windows.windows)
        assert sorted(windows.micro_batches(step, 1, 1)[0].tokens[0].tolist() for step in steps) == expected


def test_a_batch_depends_on_seed_and_step_alone(shards):
    def tokens(windows, step):
        return windows.micro_batches(step, 4, 4)[0].tokens

    windows = Windows(shards, T, seed=1)
    for step in (9, 2, 700):  # in any order
        assert tokens(windows, step).equal(tokens(Windows(shards, T, seed=1), step))
    assert not tokens(windows, 9).equal(tokens(Windows(shards, T, seed=2), 9))


def test_only_the_assistants_words_are_targets_of_conversations(tmp_path, conversations, prepared, tokenizer):
    prepared(tmp_path, conversations, val_fraction=0.0)
    shards = Shards.open(tmp_path, tokenizer_fingerprint=None)
    batches = list(sequential_batches(shards, T, batch_size=7))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    said = "".join(each.messages[1].content for each in conversations)
    assert tokenizer.decode(targets[targets != IGNORE].tolist()) == said
    assert sum(batch.count for batch in batches) == int(shards.flags_read(1, shards.tokens_total - 1).sum())


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_validation_predicts_each_token_but_the_first_once_in_order(shards, batch_size):
    batches = list(sequential_batches(shards, T, batch_size))
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    kept = targets != IGNORE
    assert targets[kept].tolist() == shards.read(1, shards.tokens_total - 1).tolist()
    assert tokens[kept].tolist() == shards.read(0, shards.tokens_total - 1).tolist()
    assert sum(batch.count for batch in batches) == shards.tokens_total - 1


def test_a_limit_takes_that_many_windows_spread_over_the_split(shards):
    everything = torch.cat([batch.tokens for batch in sequential_batches(shards, T, batch_size=4)])
    batches = list(sequential_batches(shards, T, batch_size=4, limit=10))
    assert [len(batch.tokens) for batch in batches] == [4, 4, 2]
    expected = [number * len(everything) // 10 for number in range(10)]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), everything[expected])


def test_a_corpus_smaller_than_one_window_is_refused(shards):
    total = shards.tokens_total
    assert Windows(shards, total - 1, seed=0).windows == 1
    with pytest.raises(ValueError, match=rf"needs context_length \+ 1 = {total + 1:,} tokens, .* has {total:,};"):
        Windows(shards, total, seed=0)


@pytest.mark.parametrize(("batch_size", "micro", "world"), [(6, 4, 1), (4, 1, 3), (0, 1, 1), (4, 0, 1)])
def test_a_batch_that_does_not_divide_is_refused(shards, batch_size, micro, world):
    with pytest.raises(ValueError, match=r"must divide evenly into .* take a multiple of"):
        Windows(shards, T, seed=0).micro_batches(0, batch_size, micro, world=world)
