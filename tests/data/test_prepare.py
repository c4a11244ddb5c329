import json
import os
import random
from collections import Counter
from multiprocessing import active_children

import numpy as np
import pytest

from nanollm.data.prepare import PrepareConfig, SourceSplit, falls_into_val, prepare
from nanollm.data.shards import Shards
from nanollm.sources.files import BadRecord
from nanollm.text.chat import Conversation
from tests.data.conftest import content, documents_of, manifest_of


def texts_of(folder, split, tokenizer):
    return [tokenizer.decode(ids) for ids, _ in documents_of(folder, split)]


# What goes where.


def test_documents_keep_their_order_and_each_goes_to_one_split(tmp_path, documents, prepared, tokenizer):
    prepared(tmp_path, documents)
    train, val = texts_of(tmp_path, "train", tokenizer), texts_of(tmp_path, "val", tokenizer)
    assert train == [text for text in documents if not falls_into_val(text, 0, 0.2)]
    assert val == [text for text in documents if falls_into_val(text, 0, 0.2)]
    assert 4 <= len(val) <= 22  # 12 expected


def test_identical_documents_never_stand_on_both_sides(tmp_path, documents, prepared, tokenizer):
    prepared(tmp_path, documents * 3, val_fraction=0.5)
    train, val = texts_of(tmp_path, "train", tokenizer), texts_of(tmp_path, "val", tokenizer)
    assert not set(train) & set(val)
    assert set(Counter(train + val).values()) == {3}


def test_the_same_question_with_another_answer_stays_on_the_same_side(documents):
    for text in documents:
        one, other = Conversation.of(text, "yes"), Conversation.of(text, "no")
        assert falls_into_val(one, 0, 0.5) == falls_into_val(other, 0, 0.5)


def test_the_share_of_validation_is_what_was_asked_and_seeds_differ():
    texts = [f"document {n}" for n in range(20_000)]
    drawn = np.array([[falls_into_val(text, seed, 0.1) for text in texts] for seed in (0, 1)])
    assert drawn.mean(axis=1) == pytest.approx([0.1, 0.1], abs=0.01)
    assert (drawn[0] & drawn[1]).mean() == pytest.approx(0.01, abs=0.004)


def test_text_is_cut_at_exactly_the_limit_and_reading_stops(tmp_path, documents, prepared, tokenizer):
    read = []
    parts = [SourceSplit(lambda on_bad: (read.append(text) or text for text in documents))]
    rules = PrepareConfig(kind="text", val_fraction=0.2, max_tokens_train=500, max_tokens_val=100)
    manifest = prepare(parts, tokenizer, tmp_path, rules, source={}, flush_every=20)
    assert manifest["splits"]["train"]["tokens"] == 500
    assert manifest["splits"]["val"]["tokens"] == 100
    assert len(read) < len(documents)
    whole = "".join(text for text in documents if not falls_into_val(text, 0, 0.2))
    kept = "".join(texts_of(tmp_path, "train", tokenizer))
    assert whole.startswith(kept) and manifest["splits"]["train"]["text_bytes"] == len(kept.encode())


def test_a_conversation_is_never_cut(tmp_path, conversations, prepared):
    whole = prepared(tmp_path / "whole", conversations, val_fraction=0.0)
    offsets = Shards.open(tmp_path / "whole", tokenizer_fingerprint=None).document_offsets()
    for limit in (int(offsets[20]) - 1, int(offsets[20]), int(offsets[20]) + 1):
        manifest = prepared(tmp_path / str(limit), conversations, val_fraction=0.0, max_tokens_train=limit)
        documents = 19 if limit < offsets[20] else 20
        assert manifest["splits"]["train"]["documents"] == documents
        assert manifest["splits"]["train"]["tokens"] == offsets[documents]
    assert whole["splits"]["train"]["documents"] == 60


def test_no_validation_is_left_out_of_train_when_val_is_full(tmp_path, documents, prepared, tokenizer):
    prepared(tmp_path, documents, max_tokens_val=0)
    assert texts_of(tmp_path, "train", tokenizer) == [text for text in documents if not falls_into_val(text, 0, 0.2)]


def test_parts_may_have_a_split_of_their_own(tmp_path, documents, tokenizer):
    parts = [SourceSplit(lambda on_bad: documents[:40]), SourceSplit(lambda on_bad: documents[40:], "test")]
    rules = PrepareConfig(kind="text", val_fraction=0.2, max_tokens_train=100)
    manifest = prepare(parts, tokenizer, tmp_path, rules, source={})
    assert list(manifest["splits"]) == ["train", "val", "test"]
    assert texts_of(tmp_path, "test", tokenizer) == documents[40:]


# Stopped and continued.


def test_two_processes_write_what_one_writes(tmp_path, documents, conversations, prepared):
    for name, items in (("text", documents), ("chat", conversations)):
        prepared(tmp_path / f"{name} 1", items * 5, flush_every=1500)
        prepared(tmp_path / f"{name} 2", items * 5, flush_every=900, num_workers=2)
        assert content(tmp_path / f"{name} 1") == content(tmp_path / f"{name} 2")


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_stopped_before_any_wait_for_the_disk_it_ends_in_the_same_bytes(
    tmp_path, documents, conversations, prepared, monkeypatch, kind
):
    """Whatever reaches the disk is made safe by one of these calls: stop before the first, the second, ... of them."""
    items = {"text": documents, "chat": conversations}[kind][:12]
    rules = {"max_tokens_val": 90, "shard_tokens": 150}
    prepared(tmp_path / "whole", items, **rules)
    expected = content(tmp_path / "whole")
    left = [0]

    def count_down(handle):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", count_down)
    stops = 0
    for calls in range(1000):
        left[0] = calls
        try:
            prepared(tmp_path / str(calls), items, flush_every=40, **rules)
            break
        except KeyboardInterrupt:
            stops += 1
        left[0] = 10**9
        prepared(tmp_path / str(calls), items, flush_every=40, **rules)
        assert content(tmp_path / str(calls)) == expected
    assert 20 < stops < 1000


def test_stopped_again_and_again_it_reads_past_what_is_done(tmp_path, documents, prepared, monkeypatch, tokenizer):
    prepared(tmp_path / "whole", documents)
    encoded, rng = [], random.Random(3)

    def encode_all(texts):
        for text in texts:
            if rng.random() < 0.05:
                raise KeyboardInterrupt
            encoded.append(text)
        return type(tokenizer).encode_all(tokenizer, texts)

    monkeypatch.setattr(tokenizer, "encode_all", encode_all, raising=False)
    stops = 0
    while not (tmp_path / "parts" / "manifest.json").exists():
        try:
            prepared(tmp_path / "parts", documents, flush_every=20)
        except KeyboardInterrupt:
            stops += 1
        assert stops < 100
    assert stops > 1
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert len(encoded) < 2 * len(documents)


def test_a_finished_folder_is_left_alone(tmp_path, documents, prepared, capsys):
    first = prepared(tmp_path, documents)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}
    assert prepared(tmp_path, ["never read"]) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"} == before
    assert "already prepared with these settings; nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_are_refused(tmp_path, documents, prepared, monkeypatch, is_finished):
    if is_finished:
        prepared(tmp_path, documents)
    else:
        monkeypatch.setattr("nanollm.data.prepare._Job.finish", lambda *_: None)
        prepared(tmp_path, documents)
        assert (tmp_path / "progress.json").exists()
    with pytest.raises(ValueError, match="was begun with rules seed 0, this command has 1; give another --save_dir"):
        prepared(tmp_path, documents, seed=1)


def test_another_tokenizer_is_refused(tmp_path, documents, prepared, tokenizer, monkeypatch):
    prepared(tmp_path, documents)
    monkeypatch.setattr(tokenizer, "fingerprint", "41be07" + "0" * 58, raising=False)
    with pytest.raises(ValueError, match=r"was begun with tokenizer fingerprint \w+, this command has 41be07"):
        prepared(tmp_path, documents)


def test_a_source_that_became_shorter_is_refused(tmp_path, documents, prepared):
    def breaks_off():
        yield from documents[:50]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, breaks_off(), flush_every=20)
    with pytest.raises(ValueError, match=r"the source no longer has the \d+ documents that .* holds"):
        prepared(tmp_path, documents[:5], flush_every=20)


def test_two_jobs_never_write_into_one_folder(tmp_path, documents, prepared):
    def begins_again():
        yield from documents[:30]
        with pytest.raises(ValueError, match=r"is in use by another process"):
            prepared(tmp_path / "a", documents)
        yield from documents[30:]

    prepared(tmp_path / "a", begins_again())
    prepared(tmp_path / "b", documents)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_files_of_someone_else_are_not_overwritten(tmp_path, documents, prepared):
    np.save(tmp_path / "train-00000.npy", np.zeros(3))
    with pytest.raises(
        ValueError, match=r"train-00000.npy is not part of a preparation; give an empty or a new folder"
    ):
        prepared(tmp_path, documents)


def test_a_worker_that_dies_ends_the_job_with_a_clear_message(tmp_path, documents, tokenizer, prepared):
    def read(on_bad):
        for number, text in enumerate(documents * 20):
            if number == 300:
                for worker in active_children():
                    worker.kill()
                    worker.join()
            yield text

    source = {"dataset": "test"}
    rules = PrepareConfig(kind="text", val_fraction=0.2, shard_tokens=300)
    with pytest.raises(ChildProcessError, match=r"a worker process died, .* run the same command again"):
        prepare([SourceSplit(read)], tokenizer, tmp_path / "a", rules, source=source, num_workers=2, flush_every=3000)
    prepared(tmp_path / "a", documents * 20, flush_every=3000)
    prepared(tmp_path / "b", documents * 20, flush_every=3000)
    assert content(tmp_path / "a") == content(tmp_path / "b")


# Bad records.


def with_bad_records(documents):
    """A bad record before each third document, and one at the end."""

    def read(on_bad):
        for number, text in enumerate(documents):
            if number % 3 == 0:
                on_bad(BadRecord("web.jsonl", 2 * number + 1, "text is missing"))
            yield text
        on_bad(BadRecord("web.jsonl", 999, "malformed JSON"))

    return [SourceSplit(read)]


@pytest.mark.parametrize("flush_every", [10, 150, 10**6])
def test_bad_records_are_counted_and_listed(tmp_path, documents, tokenizer, flush_every):
    rules = PrepareConfig(kind="text", val_fraction=0.0)
    manifest = prepare(with_bad_records(documents), tokenizer, tmp_path, rules, source={}, flush_every=flush_every)
    expected = [{"path": "web.jsonl", "line": 2 * n + 1, "reason": "text is missing"} for n in range(0, 60, 3)]
    expected.append({"path": "web.jsonl", "line": 999, "reason": "malformed JSON"})
    listed = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert listed == expected
    assert manifest["bad_records"] == len(expected)


def test_strict_stops_at_the_first_bad_record(tmp_path, documents, tokenizer):
    rules = PrepareConfig(kind="text", val_fraction=0.0)
    with pytest.raises(ValueError, match=r"web.jsonl:1: text is missing; repair it, or leave out --strict"):
        prepare(with_bad_records(documents), tokenizer, tmp_path, rules, source={}, strict=True)


def test_without_bad_records_there_is_no_list(tmp_path, documents, prepared):
    prepared(tmp_path, documents)
    assert manifest_of(tmp_path)["bad_records"] == 0
    assert not (tmp_path / "bad_records.jsonl").exists()


def test_a_source_without_text_is_refused_and_may_be_repaired(tmp_path, documents, tokenizer):
    rules = PrepareConfig(kind="text")
    with pytest.raises(ValueError, match=r"nothing to train on: 0 documents .* 1 records were bad"):
        prepare(with_bad_records([]), tokenizer, tmp_path, rules, source={"bytes": 0})
    prepare(with_bad_records(documents), tokenizer, tmp_path, rules, source={"bytes": 9})
