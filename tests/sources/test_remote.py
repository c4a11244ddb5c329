"""Files elsewhere are found and read like files here; fsspec's memory stands for a store."""

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from nanollm.sources.files import read_texts
from nanollm.sources.remote import find_everywhere, size_of
from nanollm.stages.tokenizer import Config, corpus_files


@pytest.fixture
def store():
    """A store with three files, one of which cannot be read."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pipe("/web/a/one.jsonl", b'{"text": "One."}\nbroken\n{"text": "Two."}\n')
    system.pipe("/web/b/README.md", b"not text for us")
    with system.open("/web/b/two.parquet", "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["Three.", "Four."]}), file)
    yield system
    system.store.clear()


def test_a_store_is_read_like_a_folder(store):
    files, bad = find_everywhere(["memory://web"]), []
    assert [(str(file), file.name) for file in files] == [
        ("memory:///web/a/one.jsonl", "one.jsonl"),
        ("memory:///web/b/two.parquet", "two.parquet"),
    ]
    assert list(read_texts(files, "text", bad.append)) == ["One.", "Two.", "Three.", "Four."]
    assert [(record.path, record.line) for record in bad] == [("memory:///web/a/one.jsonl", 2)]
    assert [size_of(file) for file in files] == [
        store.size(f"/web/{name}") for name in ("a/one.jsonl", "b/two.parquet")
    ]


def test_a_pattern_and_a_single_file_and_a_local_path_are_taken_in_their_order(store, tmp_path):
    (tmp_path / "here.txt").write_text("Here.")
    given = ["memory://web/b/*.parquet", str(tmp_path), "memory://web/a/one.jsonl", "memory://web"]
    assert [file.name for file in find_everywhere(given)] == ["two.parquet", "here.txt", "one.jsonl"]
    assert size_of(find_everywhere(given)[1]) == 5


def test_what_is_not_there_is_one_line(store, monkeypatch):
    for address, complaint in [
        ("memory://nowhere", "memory://nowhere holds no file to read"),
        ("memory://web/b/README.md", "holds no file to read"),
        ("carrier-pigeon://web", "cannot open carrier-pigeon://web: ValueError: Protocol not known"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            find_everywhere([address])
    monkeypatch.setattr(type(store), "find", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match="cannot look into memory://web: OSError: no network; check the address"):
        find_everywhere(["memory://web"])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert find_everywhere(["~/a.txt"]) == [tmp_path / "a.txt"]
    assert corpus_files(Config(corpus=["~/a.txt"])) == [tmp_path / "a.txt"]
