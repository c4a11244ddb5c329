"""Each document is measured by itself, and prepared text reads like the text it was made of."""

import math
from itertools import pairwise

import pytest
import torch

from nanollm.data.batches import IGNORE
from nanollm.evals import documents
from nanollm.evals.bits_per_byte import bits_per_byte
from nanollm.model.transformer import Transformer
from nanollm.stages import preprocess
from tests.stages.conftest import MODEL

TEXTS = ["The king rode out.", "No one knew why", "x", "Once upon a time " * 30, "An end.\n"]
T = MODEL.context_length


def test_every_token_but_the_first_is_predicted_once(tokenizer):
    targets = torch.cat([batch.targets.flatten() for batch in documents.batches(TEXTS, tokenizer, T)])
    expected = [token for text in TEXTS for token in tokenizer.encode_document(text)[1:]]
    assert sorted(targets[targets != IGNORE].tolist()) == sorted(expected)


def test_each_target_follows_its_token_in_the_document(tokenizer):
    pairs = set()
    for batch in documents.batches(TEXTS, tokenizer, T):
        assert batch.tokens.shape[1] <= T
        there = batch.targets != IGNORE
        pairs |= set(zip(batch.tokens[there].tolist(), batch.targets[there].tolist(), strict=True))
    expected = set()
    for text in TEXTS:
        ids = tokenizer.encode_document(text)
        expected |= set(pairwise(ids))
    assert pairs == expected


def test_bits_per_byte_are_those_of_the_documents_one_by_one(tokenizer):
    model = Transformer(MODEL).init(0)
    score = bits_per_byte(model, documents.batches(TEXTS, tokenizer, T), tokenizer.token_bytes)
    nats = 0.0
    for text in TEXTS:
        ids = tokenizer.encode_document(text)
        for start in range(0, len(ids) - 1, T):
            window = torch.tensor(ids[start : start + T + 1])
            logprobs = model(window[None, :-1])[0].log_softmax(-1)
            nats -= sum(logprobs[i, t].item() for i, t in enumerate(window[1:]) if tokenizer.token_bytes[t])
    assert score.bytes == sum(len(text.encode()) for text in TEXTS)
    assert score.value == pytest.approx(nats / math.log(2) / score.bytes, rel=1e-5)


def test_windows_that_need_more_than_one_round_are_all_there(tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_TOKENS", 2 * T)
    monkeypatch.setattr(documents, "BATCHES_AT_ONCE", 2)
    batches = list(documents.batches(TEXTS * 5, tokenizer, T))
    assert max(len(batch.tokens) for batch in batches) == 2
    assert sum(batch.count for batch in batches) == 5 * sum(len(tokenizer.encode_document(t)) - 1 for t in TEXTS)


def test_files_give_their_records_with_their_numbers(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"no": 1}\n{"text": "three"}\n')
    bad = []
    read = list(documents.read(tmp_path, "text", tokenizer, bad.append))
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    assert read == [(f"{a}, document 1", "one"), (f"{b}, document 1", "two"), (f"{b}, document 2", "three")]
    assert [record.line for record in bad] == [2]


def test_prepared_text_reads_like_the_text_it_was_made_of(tmp_path, tokenizer, tokenizer_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    folder = preprocess.run(
        preprocess.Config(
            kind="text",
            tokenizer_path=tokenizer_path,
            save_dir=tmp_path / "tokens",
            input=[tmp_path / "texts"],
            val_fraction=0,
        )
    )
    read = list(documents.read(folder, "text", tokenizer, pytest.fail))
    assert [text for _, text in read] == TEXTS
    assert read[1][0] == f"{folder}, train document 2"


def test_the_words_of_two_messages_do_not_run_together(tmp_path, tokenizer, tokenizer_path):
    line = '{"messages": [{"role": "user", "content": "two apples"}, {"role": "assistant", "content": "and a pear"}]}\n'
    (tmp_path / "chat.jsonl").write_text(line)
    folder = preprocess.run(
        preprocess.Config(
            kind="chat",
            tokenizer_path=tokenizer_path,
            save_dir=tmp_path / "tokens",
            input=[tmp_path / "chat.jsonl"],
            val_fraction=0,
        )
    )
    ((_, text),) = documents.read(folder, "text", tokenizer, pytest.fail)
    assert text.split() == ["two", "apples", "and", "a", "pear"]


def test_what_cannot_be_read_is_refused_before_anything_long_begins(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        documents.check(tmp_path / "nowhere", tokenizer)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="has format None"):
        documents.check(tmp_path, tokenizer)
