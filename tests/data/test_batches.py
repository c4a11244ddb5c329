import dataclasses
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from nanollm.data.batches import (
    IGNORE,
    Batch,
    ChatShards,
    Conversations,
    Documents,
    Fetcher,
    TextShards,
    Windows,
    layout_of,
    sequential_batches,
)
from nanollm.data.order import Mixture
from nanollm.data.packing import PackedLayout
from nanollm.data.prepare import PrepareConfig, SourceSplit, prepare
from nanollm.data.shards import Shards
from nanollm.model.transformer import Transformer
from nanollm.text.chat import Conversation, Marks, encode_conversation
from nanollm.train.loss import next_token_loss
from nanollm.world import World
from tests.model.conftest import TINY, randomised

T = 16


def windows_of(shards: Shards, context_length: int, seed: int, documents: Documents = "across") -> Windows:
    return Windows([TextShards(shards, context_length, documents)], Mixture([1]), seed)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, documents, tokenizer):
    folder = tmp_path_factory.mktemp("shards")
    rules = PrepareConfig(kind="text", val_fraction=0.0, shard_tokens=300)
    prepare([SourceSplit(lambda on_bad: documents)], tokenizer, folder, rules, source={})
    return Shards.open(folder, tokenizer_fingerprint=tokenizer.fingerprint)


def test_inputs_and_targets_are_one_window_shifted_by_one(shards):
    (batch,) = windows_of(shards, T, seed=0).micro_batches(3, 4, 4)
    assert batch.tokens.shape == batch.targets.shape == (4, T)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens[:, 1:].equal(batch.targets[:, :-1])
    assert batch.count == 4 * T


@pytest.mark.parametrize("layout", ["across", "apart"])
@pytest.mark.parametrize(("world", "micros"), [(1, 2), (1, 12), (2, 1), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_ranks_and_micro_batches_share_the_one_rank_batch_in_its_order(shards, world, micros, layout):
    splits = [TextShards(shards, T, layout)] * 2
    windows = Windows(splits, Mixture([1, 3], after=Mixture([1, 0]), begins=24), seed=5)
    for step in range(4):
        (whole,) = windows.micro_batches(step, 12, 12)
        size = 12 // (micros * world)
        by_rank = [windows.micro_batches(step, 12, size, rank=rank, world=world) for rank in range(world)]
        together = Batch.join(by_rank[rank][micro] for micro, rank in product(range(micros), range(world)))
        assert together.tokens.equal(whole.tokens)
        assert together.targets.equal(whole.targets)
        if layout == "across":
            assert together.positions is whole.positions is None
        else:
            assert together.positions.equal(whole.positions)


def test_over_a_long_run_every_split_is_read_by_its_weight_and_whole(shards):
    split = TextShards(shards, T)
    windows = Windows([split, split, split], Mixture([6, 3, 1]), seed=2)
    rows = Batch.join(batch for step in range(400) for batch in windows.micro_batches(step, 5, 5)).tokens
    everything = sorted(split[number].tokens[0].tolist() for number in range(len(split)))
    sources, _ = windows.mixture.draws(0, 2000)
    for source, share in enumerate((0.6, 0.3, 0.1)):
        seen = rows[torch.from_numpy(sources == source)].tolist()
        assert len(seen) == share * 2000
        for epoch in range(len(seen) // len(split)):
            assert sorted(seen[epoch * len(split) :][: len(split)]) == everything


def test_an_epoch_reads_every_window_exactly_once(shards):
    windows = windows_of(shards, T, seed=1)
    whole = torch.from_numpy(shards.read(0, len(windows.splits[0]) * T + 1).astype(np.int64))
    expected = sorted(whole[:-1].view(-1, T).tolist())
    for epoch in (0, 1):
        steps = range(epoch * len(windows.splits[0]), (epoch + 1) * len(windows.splits[0]))
        assert sorted(windows.micro_batches(step, 1, 1)[0].tokens[0].tolist() for step in steps) == expected


def test_a_batch_depends_on_seed_and_step_alone(shards):
    def tokens(windows, step):
        return windows.micro_batches(step, 4, 4)[0].tokens

    windows = windows_of(shards, T, seed=1)
    for step in (9, 2, 700):  # in any order
        assert tokens(windows, step).equal(tokens(windows_of(shards, T, seed=1), step))
    assert not tokens(windows, 9).equal(tokens(windows_of(shards, T, seed=2), 9))


def test_only_the_assistants_words_are_targets_of_conversations(tmp_path, conversations, prepared, tokenizer):
    prepared(tmp_path, conversations, val_fraction=0.0)
    shards = Shards.open(tmp_path, tokenizer_fingerprint=None)
    batches = list(sequential_batches(shards, T, batch_size=7))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    said = "".join(each.messages[1].content for each in conversations)
    assert tokenizer.decode(targets[targets != IGNORE].tolist()) == said
    assert sum(batch.count for batch in batches) == int(shards.flags_read(1, shards.tokens_total - 1).sum())


def test_for_a_gpu_a_thread_makes_the_batches_of_the_next_step_and_they_are_the_same(shards, monkeypatch):
    windows, made = windows_of(shards, T, seed=3), []
    slowly = windows.micro_batches
    monkeypatch.setattr(
        windows, "micro_batches", lambda *given, **ranks: made.append(given[0]) or slowly(*given, **ranks)
    )
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)  # that takes a GPU
    fetch = Fetcher(windows, 4, 2, World(rank=1, size=2, device=torch.device("cuda")))
    for step in (0, 1, 2, 7, 8):  # a run that goes back, or on from a checkpoint, asks for another step
        got = fetch(step)
        assert step + 1 in fetch._ahead
        for batch, expected in zip(got, slowly(step, 4, 2, rank=1, world=2), strict=True):
            assert torch.equal(batch.tokens, expected.tokens)
    fetch._ahead[9].result()
    assert made == [0, 1, 2, 3, 7, 8, 9]
    Fetcher(windows, 4, 2, World())(0)
    assert made[7:] == [0]


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
    assert len(TextShards(shards, total - 1)) == 1
    with pytest.raises(ValueError, match=rf"needs context_length \+ 1 = {total + 1:,} tokens, .* has {total:,};"):
        windows_of(shards, total, seed=0)


@pytest.mark.parametrize(("batch_size", "micro", "world"), [(6, 4, 1), (4, 1, 3), (0, 1, 1), (4, 0, 1)])
def test_a_batch_that_does_not_divide_is_refused(shards, batch_size, micro, world):
    with pytest.raises(ValueError, match=r"must divide evenly into .* take a multiple of \d+ as train.batch_size"):
        windows_of(shards, T, seed=0).micro_batches(0, batch_size, micro, world=world)


# Documents apart.


@pytest.mark.parametrize("width", [2, 7, T, 64, 256])
def test_apart_an_epoch_predicts_every_token_of_every_document_once_from_its_own_document(shards, width):
    split = TextShards(shards, width, "apart")
    rows = Batch.join(split[number] for number in range(len(split)))
    starts = [*shards.document_offsets().tolist(), shards.tokens_total]
    expected = Counter[tuple[tuple[int, ...], tuple[int, ...]]]()
    for start, end in pairwise(starts):
        ids = tuple(shards.read(start, end - start).tolist())
        for first in range(0, len(ids) - 2, width):  # a piece that predicts </s> alone is none
            piece = ids[first : first + width + 1]
            expected[piece[:-1], piece[1:]] += 1
    found = Counter[tuple[tuple[int, ...], tuple[int, ...]]]()
    for tokens, targets, positions in zip(rows.tokens, rows.targets, rows.positions, strict=True):
        for start, end in pairwise([*(positions == 0).nonzero().flatten().tolist(), width]):
            assert positions[start:end].tolist() == [*range(end - start)]
            if targets[start] != IGNORE:
                found[tuple(tokens[start:end].tolist()), tuple(targets[start:end].tolist())] += 1
    assert found == expected
    assert split.fill == pytest.approx(float((rows.targets != IGNORE).float().mean()))
    assert split.fill > 0.9


def test_apart_rows_are_known_by_seed_and_step_and_read_once_an_epoch(shards):
    windows = windows_of(shards, 64, seed=1, documents="apart")
    again = windows_of(shards, 64, seed=1, documents="apart")
    (count,) = map(len, windows.splits)
    order = [windows.names(step, 1).popitem()[1][0] for step in range(2 * count)]
    assert sorted(order[:count]) == sorted(order[count:]) == [*range(count)]
    assert order[:count] != order[count:]
    assert windows.micro_batches(99, 2, 2)[0].tokens.equal(again.micro_batches(99, 2, 2)[0].tokens)


def test_validation_of_documents_apart_reads_each_row_once(shards):
    split = TextShards(shards, 64, "apart")
    batches = list(split.batches(rows=4))
    assert sum(len(batch.tokens) for batch in batches) == len(split)
    assert sum(len(batch.tokens) for batch in split.batches(rows=4, limit=5)) == 5


def test_a_document_in_a_row_with_others_gives_the_logits_it_gives_alone(shards, tokenizer):
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, context_length=64)
    model = randomised(Transformer(config).init(0)).double().eval()
    split = TextShards(shards, 64, "apart")
    shared = 0
    for row in map(split.__getitem__, range(len(split))):
        logits = model(row.tokens, positions=row.positions)[0]
        for start, end in pairwise([*(row.positions[0] == 0).nonzero().flatten().tolist(), 64]):
            if row.targets[0, start] == IGNORE:
                continue
            torch.testing.assert_close(logits[start:end], model(row.tokens[:, start:end])[0], atol=1e-10, rtol=0)
            shared += end - start < 64
    assert shared > 20


# Conversations.

LONG = 256  # a row in which every conversation of the fixture fits


@pytest.fixture(scope="module")
def chat_folders(tmp_path_factory, conversations, tokenizer):
    """Sixty conversations, and seven others."""
    others = [Conversation.of(f"Say {n}!", f"{n}, as you wish.") for n in range(7)]
    folders = [tmp_path_factory.mktemp(name) for name in ("sixty", "seven")]
    for folder, items in zip(folders, (conversations, others), strict=True):
        rules = PrepareConfig(kind="chat", val_fraction=0.0, shard_tokens=300)
        prepare([SourceSplit(lambda on_bad, items=items: items)], tokenizer, folder, rules, source={})
    return folders


@pytest.fixture(scope="module")
def splits(chat_folders, tokenizer):
    """splits(context_length): both folders."""

    def open_both(context_length=LONG):
        marks = Marks.of(tokenizer)
        opened = [Shards.open(folder, tokenizer_fingerprint=tokenizer.fingerprint) for folder in chat_folders]
        return [ChatShards(shards, context_length, marks) for shards in opened]

    return open_both


def texts(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of every text that begins with <s>, each once, sorted."""
    found = []
    for row, positions in zip(batch.tokens, batch.positions, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(row)]
        found += [tuple(row[a:b].tolist()) for a, b in pairwise(starts) if row[a] == 2]
    return sorted(found)


def test_a_step_holds_its_conversations_whole_and_trains_only_the_assistants_words(splits, conversations, tokenizer):
    (sixty, _) = splits()
    batch = Batch.join(Conversations([sixty], Mixture([1]), seed=0).micro_batches(0, 60, 4))
    encoded = [encode_conversation(each, tokenizer) for each in conversations]
    assert texts(batch) == sorted(tuple(each.ids[:-1]) for each in encoded)
    said = Counter(token for each in conversations for token in tokenizer.encode(each.messages[1].content))
    said[tokenizer.mark_id("<|end|>")] = 60
    assert Counter(batch.targets[batch.targets != IGNORE].tolist()) == said
    empty = (batch.positions == 0) & (batch.tokens != tokenizer.bos_id)
    assert (batch.tokens[empty] == 0).all()
    assert (batch.targets[empty] == IGNORE).all()


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)])
def test_ranks_and_micro_batches_share_the_rows_of_one_batch(splits, world, micro):
    mixed = Conversations(splits(), Mixture([0.7, 0.3]), seed=5)
    for step in (0, 9):
        whole = Batch.join(mixed.micro_batches(step, 24, 1))
        by_rank = [mixed.micro_batches(step, 24, micro, rank=rank, world=world) for rank in range(world)]
        assert len({len(batches) for batches in by_rank}) == 1
        together = Batch.join([batches[m] for m in range(len(by_rank[0])) for batches in by_rank])
        assert all(len(batch.tokens) == micro for batches in by_rank for batch in batches)
        rows = len(whole.tokens)
        assert together.tokens[:rows].equal(whole.tokens)
        assert together.targets[:rows].equal(whole.targets)
        assert together.positions[:rows].equal(whole.positions)
        assert (together.targets[rows:] == IGNORE).all()
        assert not together.positions[rows:].any()


def test_conversations_of_a_step_depend_on_seed_and_step_alone(splits):
    def tokens(seed, step):
        return Batch.join(Conversations(splits(), Mixture([0.7, 0.3]), seed).micro_batches(step, 16, 2)).tokens

    for step in (9, 2, 70_000):  # in any order
        assert tokens(1, step).equal(tokens(1, step))
    assert not tokens(1, 9).equal(tokens(2, 9))


def test_sources_keep_their_share_and_each_shows_everything_once_an_epoch(splits):
    both = splits()
    mixed = Conversations(both, Mixture([0.75, 0.25]), seed=3)
    drawn = [tuple(each.ids.tolist()) for step in range(60) for each in mixed.draw(step, 8)]  # 480
    for split, share in zip(both, (0.75, 0.25), strict=True):
        everything = [tuple(split[number].ids.tolist()) for number in range(len(split))]
        seen = [ids for ids in drawn if ids in everything]
        assert len(seen) == share * len(drawn)
        for epoch in range(len(seen) // len(split)):
            assert sorted(seen[epoch * len(split) :][: len(split)]) == sorted(everything)
        assert seen[: len(split)] != seen[len(split) : 2 * len(split)]


def test_validation_reads_each_conversation_once_in_equal_batches(splits):
    sixty, _ = splits()
    whole = list(sixty.batches(rows=4))
    assert {batch.tokens.shape for batch in whole} == {(4, LONG)}
    assert texts(Batch.join(whole)) == sorted(tuple(sixty[number].ids[:-1].tolist()) for number in range(60))
    ten = Batch.join(list(sixty.batches(rows=4, limit=10)))
    assert texts(ten) == sorted(tuple(sixty[number].ids[:-1].tolist()) for number in range(0, 60, 6))


def test_what_does_not_fit_is_shortened_and_counted(splits, conversations, tokenizer):
    sixty, _ = splits(context_length=24)
    lengths = [len(encode_conversation(each, tokenizer).ids) for each in conversations]
    assert sixty.longer.tolist() == [number for number, length in enumerate(lengths) if length > 25]
    assert sixty.cuts(limit=1000) == {"cut reply": len(sixty.longer)}
    assert sixty.cuts(limit=3) == {"cut reply": 3}
    batches = Conversations([sixty], Mixture([1]), seed=0).micro_batches(0, 60, 2)
    assert {batch.tokens.shape for batch in batches} == {(2, 24)}
    assert len(texts(Batch.join(batches))) == 60


def test_documents_are_not_taken_for_conversations(shards, tokenizer):
    with pytest.raises(ValueError, match=r"holds documents, expected conversations \(nanollm preprocess"):
        ChatShards(shards, T, Marks.of(tokenizer))


def test_a_step_without_conversations_or_rows_is_refused(splits):
    conversations = Conversations(splits(), Mixture([1, 1]), seed=0)
    for batch_size, rows in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"at least 1 conversation and 1 row, got {batch_size} and {rows}"):
            conversations.micro_batches(0, batch_size, rows)


# What packing must not change.


@pytest.fixture
def model(tokenizer):
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, context_length=LONG)
    return randomised(Transformer(config).init(0))


def gradients(model, batches):
    model.zero_grad()
    loss = torch.stack([next_token_loss(model, batch)[0] for batch in batches]).sum()
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def test_packed_rows_equal_separate_rows(splits, model):
    talks = Conversations(splits(), Mixture([1, 1]), seed=0).draw(0, 12)
    packed = Batch.of(talks, layout_of(talks, LONG, 1))
    lengths = [len(each.ids) - 1 for each in talks]
    separate = Batch.of(talks, PackedLayout(lengths, [[number] for number in range(12)], LONG))
    assert len(packed.tokens) < len(separate.tokens) == 12
    loss, grads = gradients(model, [packed])
    expected_loss, expected_grads = gradients(model, [Batch(separate.tokens, separate.targets)])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    scale = max(float(grad.abs().max()) for grad in expected_grads)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6 * scale)


def test_micro_batches_of_conversations_equal_the_whole(splits, model):
    mixed = Conversations(splits(), Mixture([0.7, 0.3]), seed=0)
    expected_loss, expected_grads = gradients(model, [Batch.join(mixed.micro_batches(0, 24, 1))])
    scale = max(float(grad.abs().max()) for grad in expected_grads)
    for micro in (1, 2, 5):
        loss, grads = gradients(model, mixed.micro_batches(0, 24, micro))
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        for grad, expected in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6 * scale)


def test_no_gradient_flows_from_one_conversation_into_another(splits, model):
    _, seven = splits()
    talks = [seven[number] for number in range(3)]
    batch = Batch.of(talks, layout_of(talks, LONG, 1))
    assert len(batch.tokens) == 1
    starts = [*(batch.tokens[0] == 2).nonzero().flatten().tolist(), sum(len(each.ids) - 1 for each in talks)]
    for start, end in pairwise(starts):
        only = torch.full_like(batch.targets, IGNORE)
        only[0, start:end] = batch.targets[0, start:end]
        embedded = []
        hook = model.trunk.embed.register_forward_hook(lambda module, args, out, kept=embedded: kept.append(out))
        loss, _ = next_token_loss(model, Batch(batch.tokens, only, batch.positions))
        hook.remove()
        (flow,) = torch.autograd.grad(loss, embedded)  # (1, T, D)
        touched = flow[0].abs().amax(-1).nonzero().flatten()
        assert touched.tolist()
        assert start <= int(touched.min()) <= int(touched.max()) < end
