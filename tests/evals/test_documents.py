"""Each document is measured by itself, and prepared text reads like the text it was made of."""

import math
from itertools import pairwise

import pytest
import torch

from nanollm.bundle import Bundle
from nanollm.data.batches import IGNORE
from nanollm.evals import documents
from nanollm.evals.bits_per_byte import bits_per_byte, by_document
from nanollm.model.transformer import Transformer
from tests.stages.conftest import MODEL

TEXTS = ["The king rode out.", "No one knew why", "x", "Once upon a time " * 30, "An end.\n"]
T = MODEL.context_length


def batches(tokenizer, texts=TEXTS):
    return [batch for batch, _ in documents.numbered_batches(texts, tokenizer, T)]


def bits_alone(model, tokenizer, text):
    """Bits of one document, window by window, from rows of logits."""
    ids = tokenizer.encode_document(text)
    nats = 0.0
    for start in range(0, len(ids) - 1, T):
        window = torch.tensor(ids[start : start + T + 1])
        logprobs = model(window[None, :-1])[0].log_softmax(-1)
        nats -= sum(logprobs[i, t].item() for i, t in enumerate(window[1:]) if tokenizer.token_bytes[t])
    return nats / math.log(2)


def test_every_token_but_the_first_is_predicted_once(tokenizer):
    targets = torch.cat([batch.targets.flatten() for batch in batches(tokenizer)])
    expected = [token for text in TEXTS for token in tokenizer.encode_document(text)[1:]]
    assert sorted(targets[targets != IGNORE].tolist()) == sorted(expected)


def test_each_target_follows_its_token_in_the_document(tokenizer):
    pairs = set()
    for batch in batches(tokenizer):
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
    score = bits_per_byte(model, batches(tokenizer), tokenizer.token_bytes)
    assert score.bytes == sum(len(text.encode()) for text in TEXTS)
    bits = sum(bits_alone(model, tokenizer, text) for text in TEXTS)
    assert score.value == pytest.approx(bits / score.bytes, rel=1e-5)


def test_each_document_has_its_own_sums_in_the_order_of_the_documents(tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_TOKENS", 2 * T)
    monkeypatch.setattr(documents, "BATCHES_AT_ONCE", 2)  # the windows of a long one lie in several batches
    model = Transformer(MODEL).init(0)
    texts = [*TEXTS, "", "Once upon a time " * 20]
    rows = documents.numbered_batches(texts, tokenizer, T)
    found = by_document(model, rows, tokenizer.token_bytes)
    told = [text for text in texts if text]
    assert found.bytes.tolist() == [len(text.encode()) for text in told]
    expected = [bits_alone(model, tokenizer, text) for text in told]
    assert (found.nats / math.log(2)).tolist() == pytest.approx(expected, rel=1e-5)
    whole = pytest.approx(sum(expected) / found.bytes.sum())
    assert (found.total.value, found.ratio.value) == (whole, whole)
    assert found.tokens == sum(len(tokenizer.encode(text)) for text in told)
    assert found.ratio.low < found.ratio.value < found.ratio.high


def test_prepared_documents_are_told_apart_where_each_begins(tmp_path, tokenizer, prepared, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_TOKENS", 2 * T)  # a long one lies in several batches
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    folder = prepared("text", tmp_path, val_input=[tmp_path])
    found = documents.bits_of_prepared(Bundle(Transformer(MODEL).init(0), tokenizer, {}), folder)
    assert found.bytes.tolist() == [len(text.encode()) for text in TEXTS]


def test_windows_that_need_more_than_one_round_are_all_there(tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_TOKENS", 2 * T)
    monkeypatch.setattr(documents, "BATCHES_AT_ONCE", 2)
    found = batches(tokenizer, TEXTS * 5)
    assert max(len(batch.tokens) for batch in found) == 2
    assert sum(batch.count for batch in found) == 5 * sum(len(tokenizer.encode_document(t)) - 1 for t in TEXTS)


def test_files_give_their_records_with_their_numbers(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"no": 1}\n{"text": "three"}\n')
    bad = []
    read = list(documents.read(tmp_path, "text", tokenizer, bad.append))
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    assert read == [(f"{a}, document 1", "one"), (f"{b}, document 1", "two"), (f"{b}, document 2", "three")]
    assert [record.line for record in bad] == [2]


def test_prepared_text_reads_like_the_text_it_was_made_of(tmp_path, tokenizer, prepared):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    folder = prepared("text", tmp_path / "texts")
    read = list(documents.read(folder, "text", tokenizer, pytest.fail))
    assert [text for _, text in read] == TEXTS
    assert read[1][0] == f"{folder}, train document 2"


def test_the_words_of_two_messages_do_not_run_together(tmp_path, tokenizer, prepared):
    line = '{"messages": [{"role": "user", "content": "two apples"}, {"role": "assistant", "content": "and a pear"}]}\n'
    (tmp_path / "chat.jsonl").write_text(line)
    ((_, text),) = documents.read(prepared("chat", tmp_path / "chat.jsonl"), "text", tokenizer, pytest.fail)
    assert text.split() == ["two", "apples", "and", "a", "pear"]


def test_what_cannot_be_read_is_refused_before_anything_long_begins(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        documents.check(tmp_path / "nowhere", tokenizer)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="has format None"):
        documents.check(tmp_path, tokenizer)
