import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.sources import files
from nanollm.sources.files import BadRecord, find_files, read_records, read_rows, read_texts

TEXTS = ["one\ntwo", "  three  ", 'four, "five"\t\u00e9\U0001f600', "\u2581 \0 six"]


def read(*paths, column="text"):
    """The texts and the bad records, as (file name, line, reason)."""
    bad: list[BadRecord] = []
    texts = list(read_texts(paths, column, bad.append))
    return texts, [(record.path.rpartition("/")[2], record.line, record.reason) for record in bad]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_csv(path, texts):
    rows = "".join(f'{n},"{text.replace(chr(34), chr(34) * 2)}"\n' for n, text in enumerate(texts))
    path.write_bytes(f"id,text\n{rows}".encode())
    return path


def write_parquet(path, texts):
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=3)
    return path


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


def pack(path, packing):
    if packing == "":
        return path
    content = path.read_bytes()
    packed = path.with_name(path.name + packing)
    packed.write_bytes(gzip.compress(content) if packing == ".gz" else zstandard.ZstdCompressor().compress(content))
    return packed


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_every_text_exactly(tmp_path, kind, packing):
    path = pack(WRITERS[kind](tmp_path / f"a.{kind}", TEXTS * 300), packing)
    assert read(path) == (TEXTS * 300, [])


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_a_txt_file_is_one_document(tmp_path, packing):
    path = tmp_path / "a.txt"
    path.write_text("line one\n\nline two\n", encoding="utf-8")
    assert read(pack(path, packing), column="whatever") == (["line one\n\nline two\n"], [])


def test_columns_come_in_the_order_asked_for(tmp_path):
    table = {"a": ["1", "2"], "b": ["x", "y"], "c": ["p", "q"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("a,b,c\n1,x,p\n2,y,q\n")
    (tmp_path / "t.jsonl").write_text('{"a": "1", "b": "x", "c": "p"}\n{"a": "2", "b": "y", "c": "q"}\n')
    for path in tmp_path.iterdir():
        assert list(read_rows([path], ["c", "a"], pytest.fail)) == [("p", "1"), ("q", "2")]


def test_an_endless_line_is_reported_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "b"}\n')
    (tmp_path / "a.csv").write_text("text\na\n" + "x" * 5000 + "\nb\n")
    assert read(tmp_path / "a.jsonl") == (["a", "b"], [("a.jsonl", 2, "the line is longer than 1,000 bytes")])
    texts, bad = read(tmp_path / "a.csv")
    assert texts == ["a"]
    assert bad == [("a.csv", 2, "cannot be read any further: line 3 is longer than 1,000 bytes")]


@given(text=st.text(st.sampled_from("ab\n\u00e9\U0001f600"), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_a_huge_txt_file_comes_in_parts_that_lose_no_character(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("huge") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "DOCUMENT_BYTES", 16)
        parts = list(read_records([path], ["text"], lambda values: (values[0],), pytest.fail))
    parts = [content for (content,) in parts]
    assert "".join(parts) == text
    assert all(len(part.encode()) <= 20 for part in parts)


def test_a_huge_txt_file_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 34)
    (tmp_path / "a.txt").write_text("a paragraph\nof two lines\n\nanother paragraph\n\nand the last one")
    texts, bad = read(tmp_path / "a.txt")
    assert texts == ["a paragraph\nof two lines\n\n", "another paragraph\n\n", "and the last one"]
    assert bad == []


def test_a_folder_is_searched_in_a_fixed_order(tmp_path):
    (tmp_path / "inner").mkdir()
    names = ["b.txt", "a.jsonl.gz", "inner/c.parquet", "inner/D.TXT"]
    for name in [*names, ".hidden.txt", "readme.md", "model.bin"]:
        (tmp_path / name).write_bytes(b"x")
    found = find_files([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a.jsonl.gz",
        "b.txt",
        "inner/D.TXT",
        "inner/c.parquet",
    ]
    assert find_files([tmp_path / "b.txt", tmp_path]) == [found[1], found[0], *found[2:]]


def test_what_cannot_be_an_input_is_refused_with_advice(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        find_files([tmp_path / "none.txt"])
    with pytest.raises(ValueError, match=r"a\.docx is not one of \.txt, \.jsonl, \.json, \.csv, \.parquet"):
        find_files([tmp_path / "a.docx"])
    with pytest.raises(FileNotFoundError, match="holds no file to read"):
        find_files([tmp_path])


def test_a_split_is_chosen_by_the_names_in_a_folder(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "train-00000-of-00001.parquet", "latest.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find_files([tmp_path], "test")] == ["test.jsonl"]
    assert len(find_files([tmp_path], "train")) == 2
    assert find_files([tmp_path / "test.jsonl"], "train") == [tmp_path / "test.jsonl"]  # named by hand
    with pytest.raises(FileNotFoundError, match="with 'validation' in its name"):
        find_files([tmp_path], "validation")


def test_a_txt_file_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="one text, not the columns prompt, response"):
        list(read_rows([tmp_path / "a.txt"], ["prompt", "response"], pytest.fail))


@pytest.mark.parametrize("form", ["lines", "one line", "pretty", "a list on each line", "one after the other"])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz"])
def test_a_list_of_records_is_read_whatever_its_lines_and_its_name(tmp_path, form, ending):
    records = [{"text": f"{number} [é] {{x}}\n", "more": [{"a": [number]}]} for number in range(300)]
    each = [json.dumps(record, ensure_ascii=False) for record in records]
    written = {
        "lines": "[\n" + ",\n".join(each) + "\n]\n",
        "one line": json.dumps(records),
        "pretty": json.dumps(records, indent=2),
        "a list on each line": "\n".join(f"[{one}]" for one in each),
        "one after the other": "\n".join(each),
    }[form]
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(written.encode()) if ending.endswith(".gz") else written.encode())
    assert read(path) == ([record["text"] for record in records], [])


def test_an_element_that_is_not_whole_yet_is_tried_a_few_times_only(tmp_path, monkeypatch):
    tried = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, *arguments):
            tried.append(1)
            return super().raw_decode(*arguments)

    monkeypatch.setattr(files.json, "JSONDecoder", Counting)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([{"text": "x", "more": list(range(20_000))}], indent=1))  # one element on 20,000 lines
    assert read(path) == (["x"], [])
    assert len(tried) < 40


def test_a_line_of_a_list_that_is_too_long_is_never_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('[{"text": "one"},\n{"text": "' + "x" * 200 + '"},\n{"text": "three"}]')
    texts, bad = read(path)
    assert texts == ["one"]
    assert "line 2 is longer than 100 bytes" in bad[0][2]


def test_a_list_that_breaks_off_gives_what_comes_before(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one"}, {"text": 2}, {"text": "thr')
    texts, bad = read(path)
    assert texts == ["one"]
    assert [line for _, line, _ in bad] == [2, 3]
    assert "malformed JSON in element 3" in bad[1][2]


def test_what_is_passed_over_in_a_folder_is_said_with_its_number(tmp_path, capsys):
    for name in (
        "a.txt",
        ".ipynb_checkpoints/a.txt",
        ".git/b.txt",
        "__MACOSX/a.txt",
        "deep/b.txt",
        "x.md",
        "y.md",
        "z",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "self").symlink_to(tmp_path)
    assert [path.name for path in find_files([tmp_path])] == ["a.txt", "b.txt"]
    said = capsys.readouterr().err
    assert f"{tmp_path}: passed over " in said
    assert all(each in said for each in ("3 hidden folders", "2 .md", "1 without ending", "1 linked folders"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named_and_never_read_as_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Hello, world, as PowerShell writes it.\n".encode(encoding))
    texts, bad = read(tmp_path / "a.txt")
    assert texts == []
    assert bad == [("a.txt", 1, "UTF-16; convert the file to UTF-8")]
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n{"text": "two"}\n'.encode(encoding))
    assert read(tmp_path / "a.jsonl")[0] == []


@pytest.mark.parametrize("closes", [False, True])
def test_rows_that_an_open_quote_took_in_are_counted_with_the_line_where_it_began(tmp_path, closes):
    lines = ["id,text", *(f"{number},fine" for number in range(1, 101))]
    lines[5] = '5,"never again'
    if closes:
        lines[90] = '90,fine"'
    (tmp_path / "in.csv").write_text("\n".join(lines))
    texts, bad = read(tmp_path / "in.csv")
    assert len(texts) == (14 if closes else 4)
    assert "line 6" in bad[0][2]
    assert ("86 lines" if closes else "96 lines") in bad[0][2]


def test_a_field_of_many_lines_is_a_text(tmp_path):
    text = "\n".join(f"Line {number}, of a poem." for number in range(300))
    (tmp_path / "in.csv").write_text(f'id,name,text\n1,poem,"{text}"\n')
    assert read(tmp_path / "in.csv") == ([text], [])
