"""The parts that several jobs prepared become one folder, once, whoever is killed."""

import os
import shutil
from collections import Counter
from itertools import pairwise
from threading import Barrier, Thread

import pytest

from nanollm.data.merge import begin_part, finish_merge, merge, missing, part_folder, part_source, refuse_parts
from nanollm.data.prepare import PrepareConfig, SourceSplit, header_of, prepare
from nanollm.data.shards import Shards
from nanollm.sources.files import BadRecord
from nanollm.sources.split import share
from nanollm.text.chat import Conversation
from tests.data.conftest import content, manifest_of

PARTS = 3
SOURCE = {"dataset": "test"}


def texts_of(folder, split, tokenizer):
    shards = Shards.open(folder, split, tokenizer_fingerprint=tokenizer.fingerprint, verify="sha256")
    borders = [*shards.document_offsets().tolist(), shards.tokens_total]
    return Counter(tokenizer.decode(shards.read(a, b - a)) for a, b in pairwise(borders))


def rules_of(items, **rules):
    kind = "chat" if isinstance(items[0], Conversation) else "text"
    return PrepareConfig(**{"kind": kind, "val_fraction": 0.2, "shard_tokens": 300} | rules)


@pytest.fixture
def prepare_part(tokenizer):
    """One of PARTS jobs: prepare its share of the items, with a bad record behind each of them where `bad`."""

    def job(folder, items, part, *, parts=PARTS, bad=False, **rules):
        def read(files, on_bad):
            for number, item in enumerate(items):
                yield item
                if bad:
                    on_bad(BadRecord("source", number, "broken"))

        chosen = rules_of(items, **rules)
        into = begin_part(folder, part, parts, header_of(tokenizer, chosen, SOURCE))
        stretches = [SourceSplit(share(read, None, part, parts))]
        source = part_source(SOURCE, part, parts)
        return prepare(stretches, tokenizer, into, chosen, source=source, flush_every=100, may_be_empty=True)

    return job


@pytest.fixture
def merged(tokenizer, prepare_part):
    """Prepare all parts and merge them."""

    def job(folder, items, *, parts=PARTS, bad=False, **rules):
        for part in range(parts):
            prepare_part(folder, items, part, parts=parts, bad=bad, **rules)
        return merge(folder, parts, header_of(tokenizer, rules_of(items, **rules), SOURCE))

    return job


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_merged_parts_hold_the_documents_of_one_job(
    tmp_path, documents, conversations, prepared, merged, tokenizer, kind
):
    items = {"text": documents, "chat": conversations}[kind]
    one = prepared(tmp_path / "one", items)
    whole = merged(tmp_path / "parts", items)
    for split in ("train", "val"):
        assert texts_of(tmp_path / "parts", split, tokenizer) == texts_of(tmp_path / "one", split, tokenizer)
        for total in ("tokens", "documents", "text_bytes"):
            assert whole["splits"][split][total] == one["splits"][split][total]
    assert {key: whole[key] for key in one if key != "splits"} == {key: one[key] for key in one if key != "splits"}
    assert whole == manifest_of(tmp_path / "parts") and whole["parts"] == PARTS
    listed = {name for split in whole["splits"].values() for shard in split["shards"] for name in shard["files"]}
    assert content(tmp_path / "parts").keys() == {*listed, "manifest.json"}


def test_each_bad_record_is_listed_once(tmp_path, documents, merged):
    whole = merged(tmp_path, documents, bad=True)
    lines = (tmp_path / "bad_records.jsonl").read_text().splitlines()
    assert whole["bad_records"] == len(lines) == len(set(lines)) == len(documents)


def test_more_parts_than_documents_leave_some_empty(tmp_path, documents, prepared, merged, tokenizer):
    items = documents[:5]
    merged(tmp_path / "parts", items, parts=8, val_fraction=0.0)
    prepared(tmp_path / "one", items, val_fraction=0.0)
    assert texts_of(tmp_path / "parts", "train", tokenizer) == texts_of(tmp_path / "one", "train", tokenizer)


def test_nothing_in_all_parts_is_refused(tmp_path, documents, merged):
    with pytest.raises(ValueError, match="nothing to train on: 0 documents of the source went to other splits"):
        merged(tmp_path, documents[:2], max_tokens_train=1, max_tokens_val=0, val_fraction=0.999999)


def test_parts_are_missing_until_the_last_one_is_done(tmp_path, documents, prepare_part):
    for part, others in ((1, [0, 2]), (0, [2]), (2, [])):
        prepare_part(tmp_path, documents, part)
        assert missing(tmp_path, PARTS) == others
    (part_folder(tmp_path, 1, PARTS) / "progress.json").touch()
    assert missing(tmp_path, PARTS) == [1]


# Killed.


def test_a_merge_that_is_killed_anywhere_ends_the_same(
    tmp_path, documents, prepare_part, merged, tokenizer, monkeypatch
):
    """Whatever reaches the disk goes through one of these calls: stop before the first, the second, ... of them."""
    items = documents[:12]
    merged(tmp_path / "whole", items, bad=True)
    expected = content(tmp_path / "whole")
    for part in range(PARTS):
        prepare_part(tmp_path / "parts", items, part, bad=True)
    header = header_of(tokenizer, rules_of(items), SOURCE)
    left = [10**9]

    def stoppable(call):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, stoppable(getattr(os, name)))
    stops = 0
    for calls in range(1000):
        folder = tmp_path / str(calls)
        shutil.copytree(tmp_path / "parts", folder)
        left[0] = calls
        try:
            merge(folder, PARTS, header)
            break
        except KeyboardInterrupt:
            stops += 1
        left[0] = 10**9
        finish_merge(folder)
        merge(folder, PARTS, header)
        assert content(folder) == expected
        shutil.rmtree(folder)
    assert 20 < stops < 1000


def test_several_that_merge_at_once_end_as_one(tmp_path, documents, prepare_part, tokenizer):
    for part in range(PARTS):
        prepare_part(tmp_path, documents, part)
    header, start, ends = header_of(tokenizer, rules_of(documents), SOURCE), Barrier(4), []

    def job():
        start.wait()
        ends.append(merge(tmp_path, PARTS, header))

    jobs = [Thread(target=job) for _ in range(4)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert ends == [manifest_of(tmp_path)] * 4


# What does not belong together.


@pytest.mark.parametrize(("other", "named"), [({"seed": 1}, "rules seed 0"), ({"shard_tokens": 99}, "rules shard_tok")])
def test_parts_with_other_rules_are_refused_before_they_begin(tmp_path, documents, prepare_part, other, named):
    prepare_part(tmp_path, documents, 0)
    with pytest.raises(ValueError, match=rf"part-00000-of-00003 was begun with {named}.*, this command has"):
        prepare_part(tmp_path, documents, 1, **other)


def test_parts_with_another_tokenizer_are_refused_by_the_merge_too(tmp_path, documents, prepare_part, tokenizer):
    for part in range(PARTS):
        prepare_part(tmp_path, documents, part)
    header = header_of(tokenizer, rules_of(documents), SOURCE)
    header["tokenizer"] = {"fingerprint": "0" * 64, "vocab_size": 600}
    with pytest.raises(ValueError, match=r"part-00000-of-00003 was begun with tokenizer fingerprint .* has 000000"):
        merge(tmp_path, PARTS, header)


def test_another_number_of_parts_is_refused(tmp_path, documents, prepare_part):
    prepare_part(tmp_path, documents, 0)
    with pytest.raises(ValueError, match=r"prepared in 3 parts, this command has --parts 4; go on with --parts 3"):
        prepare_part(tmp_path, documents, 1, parts=4)


def test_one_job_and_several_do_not_share_a_folder(tmp_path, documents, prepare_part):
    prepare_part(tmp_path / "parts", documents, 0)
    with pytest.raises(ValueError, match=r"part-00000-of-00003: it is prepared in parts; go on with --part and"):
        refuse_parts(tmp_path / "parts")
    (tmp_path / "progress.json").touch()
    with pytest.raises(ValueError, match="was begun without --parts"):
        prepare_part(tmp_path, documents, 0)


def test_a_file_that_was_damaged_before_the_merge_is_named(tmp_path, documents, prepare_part, tokenizer):
    for part in range(PARTS):
        prepare_part(tmp_path, documents, part)
    with (part_folder(tmp_path, 1, PARTS) / "train-00000.npy").open("ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match=r"train-0000\d.npy has .* bytes, .*part-00001-of-00003/manifest.json says"):
        merge(tmp_path, PARTS, header_of(tokenizer, rules_of(documents), SOURCE))


# Which documents are whose.


@pytest.mark.parametrize("files", [None, ["a"], ["a", "b", "c"], [*"abcdefgh"]])
def test_each_document_and_each_bad_record_is_in_exactly_one_part(files):
    def read(files, on_bad):
        for file in files or ["hub"]:
            for number in range(10):
                on_bad(BadRecord(file, number, "broken"))
                yield f"{file}{number}"

    def all_of(part, parts):
        bad = []
        return list(share(read, files, part, parts)(bad.append)), bad

    whole, all_bad = all_of(0, 1)
    for parts in (2, 3, 7):
        shares = [all_of(part, parts) for part in range(parts)]
        assert sorted(document for some, _ in shares for document in some) == sorted(whole)
        assert Counter(record for _, some in shares for record in some) == Counter(all_bad)
        assert [all_of(part, parts) for part in range(parts)] == shares
