import json
import os

import numpy as np
import pytest

from nanollm import durable
from nanollm.data.shards import Shards, ShardWriter
from tests.data.conftest import content, documents_of, manifest_of


@pytest.fixture
def folder(tmp_path, documents, prepared):
    prepared(tmp_path / "owt", documents)
    return tmp_path / "owt"


def test_every_document_comes_back_with_sentencepieces_own_ids(folder, documents, tokenizer):
    found = {}
    for split in ("train", "val"):
        rows = [ids.tolist() for ids, _ in documents_of(folder, split)]
        assert len(rows) == Shards.open(folder, split, tokenizer_fingerprint=tokenizer.fingerprint).documents
        found |= {tokenizer.decode(row): row for row in rows}
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert found == {text: [bos, *tokenizer._sp.encode(text), eos] for text in documents}


def test_reading_across_files_equals_one_long_vector(folder, tokenizer):
    shards = Shards.open(folder, tokenizer_fingerprint=None)
    paths = sorted(path for path in folder.glob("train-*.npy") if path.suffixes == [".npy"])
    whole = np.concatenate([np.load(path) for path in paths])
    assert len(paths) > 3 and len(whole) == shards.tokens_total
    rng = np.random.default_rng(0)
    for start, end in np.sort(rng.integers(0, len(whole) + 1, (200, 2)), axis=1).tolist():
        ids = shards.read(start, end - start)
        assert ids.dtype == np.uint16 and ids.tolist() == whole[start:end].tolist()
    with pytest.raises(IndexError, match="asked for"):
        shards.read(len(whole) - 1, 2)


def test_any_numpy_opens_the_files_and_they_hold_what_was_written_and_no_more(folder):
    for split in manifest_of(folder)["splits"].values():
        for shard in split["shards"]:
            for name, file in shard["files"].items():
                column = np.load(folder / name, mmap_mode="r")
                assert len(column) == shard["documents" if "offsets" in name else "tokens"]
                assert (folder / name).stat().st_size == 128 + column.nbytes == file["size"]
                if "offsets" not in name:
                    assert column.dtype == np.uint16 and column[-1] == 3  # </s>, not a tail of zeros


def test_a_document_is_never_cut_across_two_files(folder, tokenizer):
    for path in folder.glob("*.offsets.npy"):
        tokens = np.load(path.with_name(path.name.replace(".offsets", "")))
        assert (tokens[np.load(path)] == tokenizer.bos_id).all()
        assert tokens[-1] == tokenizer.eos_id


def test_conversations_come_back_with_their_flags(tmp_path, conversations, prepared, tokenizer):
    prepared(tmp_path, conversations, val_fraction=0.0)
    shards = Shards.open(tmp_path, tokenizer_fingerprint=tokenizer.fingerprint, verify="sha256")
    ids, flags = shards.read(0, shards.tokens_total), shards.flags_read(0, shards.tokens_total)
    assert flags.dtype == np.uint8 and len(flags) == len(ids)
    assert tokenizer.decode(ids[flags == 1]) == "".join(each.messages[1].content for each in conversations)


def test_files_that_were_verified_are_read_again_only_after_they_were_written_to(folder, monkeypatch):
    read, sha256_of = [], durable.sha256_of

    def open_it():
        read.clear()
        return Shards.open(folder, tokenizer_fingerprint=None)

    monkeypatch.setattr(durable, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    open_it()
    open_it()
    files = [path for path in folder.iterdir() if path.name.startswith("train-")]
    assert {path.name for path in files} < {*read}  # just written: their times are not settled
    for path in files:
        os.utime(path, (10**9, 10**9))
    open_it()
    open_it()
    assert read == ["manifest.json"]
    path = folder / "train-00001.npy"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(path, (10**9, 10**9))  # the time of before
    with pytest.raises(ValueError, match=r"train-00001.npy has sha256"):
        open_it()
    path.write_bytes(raw)
    (folder / "verified.json").write_text("{}")
    open_it()
    assert {path.name for path in files} < {*read}


def test_plain_text_has_no_flags_to_read(folder):
    with pytest.raises(ValueError, match="plain text: every token is trained"):
        Shards.open(folder, tokenizer_fingerprint=None).flags_read(0, 1)


@pytest.mark.parametrize("done", [1, 7, 8, 30, 50])
def test_a_writer_goes_on_after_its_last_sync(tmp_path, done):
    """What was written after the sync, finished files included, is written again and comes out the same."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 65_536, size, dtype=np.uint16) for size in rng.integers(1, 40, 50)]

    def write(folder, rows, entry=None):
        folder.mkdir(exist_ok=True)
        writer = ShardWriter(folder, "train", shard_tokens=100, flags=False, resume=entry)
        for row in rows:
            writer.add(row, text_bytes=len(row))
        return writer

    write(tmp_path / "whole", rows).finish()
    killed = write(tmp_path / "parts", rows[:done])
    entry = json.dumps(killed.sync())
    killed.close()
    write(tmp_path / "parts", rows[done : done + 15], json.loads(entry)).close()
    write(tmp_path / "parts", rows[done:], json.loads(entry)).finish()
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


# Each thing that is wrong with a folder, and what the user is told.


def test_another_tokenizers_shard_is_refused(folder):
    written = manifest_of(folder)["tokenizer"]["fingerprint"]
    with pytest.raises(ValueError, match=f"was written with tokenizer {written[:6]}, this run uses 41be07. Prepare it"):
        Shards.open(folder, tokenizer_fingerprint="41be07" + "0" * 58)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path, raw: np.save(path, np.load(path).astype(np.int16)),
        lambda path, raw: np.save(path, np.load(path).astype(np.float16)),
        lambda path, raw: path.write_bytes(bytes(len(raw))),
    ],
)
def test_what_is_no_npy_file_of_ids_is_refused_without_its_sum_too(folder, spoil):
    """Every other damage: tests/faults/test_corruption.py."""
    path = folder / "train-00000.npy"
    spoil(path, path.read_bytes())
    with pytest.raises(ValueError, match=r"train-00000.npy is not a .npy file .*; prepare the folder again"):
        Shards.open(folder, tokenizer_fingerprint=None, verify="size")


def test_a_folder_without_manifest_is_told_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json in it\); make one: nanollm preprocess KIND"):
        Shards.open(tmp_path / "nothing", tokenizer_fingerprint=None)


def test_an_unfinished_folder_is_told_how_to_finish(folder):
    (folder / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="not finished: run the same nanollm preprocess command again"):
        Shards.open(folder, tokenizer_fingerprint=None)


@pytest.mark.parametrize(("manifest", "complaint"), [("{", "is not valid JSON"), ('{"format": "x"}', "has format 'x'")])
def test_a_damaged_or_foreign_manifest_is_refused(folder, manifest, complaint):
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=rf"manifest.json {complaint}.*prepare the folder again"):
        Shards.open(folder, tokenizer_fingerprint=None)


def test_an_empty_or_unknown_split_is_refused(tmp_path, documents, prepared):
    prepared(tmp_path, documents, val_fraction=0.0)
    with pytest.raises(ValueError, match=r"the split 'val' of .* is empty; .*--val_fraction"):
        Shards.open(tmp_path, "val", tokenizer_fingerprint=None)
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        Shards.open(tmp_path, "test", tokenizer_fingerprint=None)
