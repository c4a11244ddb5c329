"""A file that is broken, cut short, of the wrong kind or endless costs its own records, each named with file, line and
reason, and never the rest, the memory or a traceback."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nanollm import cli
from nanollm.sources import files
from nanollm.sources.files import read_texts
from tests.conftest import STORY
from tests.data.conftest import documents_of

ONE, TWO = b'{"text": "good one"}\n', b'{"text": "good two"}\n'
GOOD = ["good one", "good two"]
MANY = [f"good number {number} of the rows" for number in range(40)]
SURROGATE = "text is not valid Unicode"
CANNOT, NO_MORE = "cannot be read at all: ", "cannot be read any further: "
MISPLACED = "new-line character seen in unquoted field"


def parquet(table, **options):
    content = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table({"text": table}), content, **options)
    return content.getvalue()


def careless(*texts):
    """Bytes that are said to be text."""
    raw = pa.array(texts, pa.binary())
    return parquet(pa.Array.from_buffers(pa.string(), len(raw), raw.buffers()))


def gz(content, level=9):
    """Without the time of day, which the header holds by default; with level 0 the same bytes by any zlib."""
    return gzip.compress(content, level, mtime=0)


def zstd(content, **options):
    return zstandard.ZstdCompressor(**options).compress(content)


def with_bytes(content, at, new):
    return content[:at] + new + content[at + len(new) :]


def broken_page(number):
    """Forty rows in four groups, of which the first page of one is overwritten."""
    content = parquet(MANY, row_group_size=10, use_dictionary=False)
    page = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(number).column(0).data_page_offset
    return with_bytes(content, page, b"\xff" * 40)


# name, content, bad records as (line, how the reason begins), texts that must come out
TEXT_FILES = [
    # JSON
    ("cut.jsonl", ONE + b'{"text": "cut of\n' + TWO, [(2, "malformed JSON: Invalid control character")], GOOD),
    ("other.jsonl", ONE + b'{"txet": "x"}\n' + TWO, [(2, "no text here, only txet")], GOOD),
    ("number.jsonl", ONE + b'{"text": 7}\n' + TWO, [(2, "text must be text, got int")], GOOD),
    ("list.jsonl", ONE + b'{"text": ["x"]}\n' + TWO, [(2, "text must be text, got list")], GOOD),
    ("null.jsonl", ONE + b'{"text": null}\n' + TWO, [(2, "text is missing")], GOOD),
    ("nan-beside.jsonl", ONE + b'{"text": "good two", "score": NaN}\n', [], GOOD),
    ("array.jsonl", ONE + b'["text", "x"]\n' + TWO, [(2, "expected a JSON object, got list")], GOOD),
    ("latin-1.jsonl", ONE + b'{"text": "na\xefve"}\n' + TWO, [(2, "not UTF-8")], GOOD),
    ("utf-16.jsonl", ONE + '{"text": "x"}\n'.encode("utf-16"), [(2, "not UTF-8"), (3, "malformed JSON")], GOOD[:1]),
    ("mark.jsonl", b"\xef\xbb\xbf" + ONE + TWO, [], GOOD),
    ("nul.jsonl", ONE + b'{"text": "a\0b"}\n\0\0\n' + TWO, [(2, "malformed JSON"), (3, "malformed JSON")], GOOD),
    ("nul-escape.jsonl", b'{"text": "a\\u0000b"}\n', [], ["a\0b"]),
    ("half-pair.jsonl", ONE + b'{"text": "x\\ud800"}\n' + TWO, [(2, SURROGATE)], GOOD),
    ("pair.jsonl", b'{"text": "\\ud83d\\ude00"}\n', [], ["\U0001f600"]),
    ("half-key.jsonl", ONE + b'{"\\ud800\\u001b[2J": 1}\n' + TWO, [(2, r"no text here, only \ud800\x1b[2J")], GOOD),
    ("long-key.jsonl", ONE + b'{"' + b"k" * 9999 + b'": 1}\n' + TWO, [(2, f"no text here, only {'k' * 281} ..")], GOOD),
    ("deep.jsonl", ONE + b"[" * 100_000 + b"]" * 100_000 + b"\n" + TWO, [(2, "malformed JSON: nested too dee")], GOOD),
    (
        "deep-beside.jsonl",
        ONE + b'{"more": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001 + b"\n" + TWO,
        [(2, "malformed JSON: nested")],
        GOOD,
    ),
    ("huge-number.jsonl", ONE + b'{"text": 1' + b"0" * 5000 + b"}\n" + TWO, [(2, "malformed JSON: Exceeds the")], GOOD),
    ("windows.jsonl", ONE.replace(b"\n", b"\r\n") + b"\r\n" + TWO.replace(b"\n", b"\r\n"), [], GOOD),
    ("separator.jsonl", '{"text": "a\u2028b"}\n'.encode(), [], ["a\u2028b"]),
    ("empty.jsonl", b"", [(0, "holds no records")], []),
    ("blank.jsonl", b"\n  \n\r\n\t\n", [(0, "holds no records")], []),
    # plain text
    ("empty.txt", b"", [(0, "holds no records")], []),
    ("blank.txt", b"\n \n\t\n", [(1, "text is empty")], []),
    ("windows.txt", b"\xef\xbb\xbfone\r\n\0two\r\n", [], ["one\n\0two\n"]),
    ("latin-1.txt", b"one\ntwo\nna\xefve\n", [(3, "not UTF-8; convert the file")], []),
    # CSV
    ("open.csv", b'text\ngood one\n"never closed\nrest\n', [(2, "malformed CSV at line 4: unexpected end")], GOOD[:1]),
    ("quote.csv", b'text\ngood one\n"a" b\n"good two"\n', [(2, "malformed CSV at line 3: ',' expected")], GOOD),
    ("fields.csv", b"id,text\n1,good one\n2\n3,a,b\n4,good two\n", [(2, "expected 2"), (3, "expected 2")], GOOD),
    ("latin-1.csv", b"text\ngood one\nna\xefve\ngood two\n", [(2, SURROGATE)], GOOD),
    ("nul.csv", b"text\na\0b\n", [], ["a\0b"]),
    ("mark.csv", b"\xef\xbb\xbftext\r\ngood one\r\ngood two\r\n", [], GOOD),
    ("semicolons.csv", b"id;text\n1;x\n", [(0, "no text here, only id;text")], []),
    ("header.csv", b"text\n", [(0, "holds no records")], []),
    ("empty.csv", b"", [(0, "holds no records")], []),
    # packed
    ("cut.jsonl.gz", gz(ONE + TWO)[:-4], [(3, f"{NO_MORE}Compressed file ended before")], GOOD),
    ("garbage.jsonl.gz", gz(ONE + TWO) + b"garbage", [(3, f"{NO_MORE}Not a gzipped file")], GOOD),
    ("zeros.jsonl.gz", gz(ONE + TWO) + bytes(999), [], GOOD),  # as tape archives pad them
    ("sum.jsonl.gz", with_bytes(gz(ONE + TWO), -8, b"1234"), [(3, f"{NO_MORE}CRC check failed")], GOOD),
    ("two.jsonl.gz", gz(ONE) + gz(TWO), [], GOOD),
    ("two.jsonl.zst", zstd(ONE) + zstd(TWO), [], GOOD),
    ("twice.jsonl.gz", gz(gz(ONE, 0)), [(1, "not UTF-8"), (2, "not UTF-8")], []),
    ("cut.jsonl.zst", zstd(ONE) + zstd(TWO)[:-4], [(0, f"{CANNOT}Truncated compressed stream")], []),
    ("garbage.jsonl.zst", zstd(ONE + TWO) + b"garbage", [(0, f"{CANNOT}ZSTD decom")], []),
    (
        "sum.jsonl.zst",
        with_bytes(zstd(ONE, write_checksum=True), -4, b"1234"),
        [(0, f"{CANNOT}ZSTD decom")],
        [],
    ),
    ("other.jsonl.zst", gz(ONE), [(0, f"{CANNOT}ZSTD decom")], []),
    # Parquet
    ("footer.parquet", parquet(GOOD)[:-6], [(0, f"{CANNOT}Parquet magic bytes not found in footer")], []),
    ("thrift.parquet", with_bytes(parquet(GOOD), -60, b"\xff" * 50), [(0, f"{CANNOT}Couldn't deserialize")], []),
    ("page.parquet", broken_page(1), [(11, NO_MORE)], MANY[:10]),
    ("columns.parquet", parquet(pa.table({"body": GOOD, "id": [1, 2]})), [(0, "no text here, only body, id")], []),
    ("name.parquet", parquet(GOOD).replace(b"\x04text", b"\x04te\xfft"), [(0, f"{CANNOT}'utf-8' codec can't")], []),
    ("numbers.parquet", parquet([1, 2]), [(1, "text must be text, got int"), (2, "text must be text, got int")], []),
    ("bytes.parquet", parquet([b"a\xff"]), [(1, "text must be text, got bytes")], []),
    ("date.parquet", parquet(pa.array([2**62], pa.timestamp("us"))), [(1, "text must be text, got Timest")], []),
    ("rows.parquet", parquet(pa.array([], pa.string())), [(0, "holds no records")], []),
    ("nulls.parquet", parquet(["good one", None, "good two"]), [(2, "text is missing")], GOOD),
    (
        "careless.parquet",
        careless(b"good one", b"not \xff UTF-8", b"", b"good two"),
        [(2, SURROGATE), (3, "text is em")],
        GOOD,
    ),
    ("wide.parquet", parquet(pa.array(GOOD, pa.large_string())), [], GOOD),
    ("view.parquet", parquet(pa.array(GOOD, pa.string_view())), [], GOOD),
    ("categories.parquet", parquet(pa.array(GOOD).dictionary_encode()), [], GOOD),
    ("cut.parquet.gz", gz(parquet(GOOD))[:-4], [(0, f"{CANNOT}Compressed file ended before")], []),
]

HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = json.dumps({"messages": [HI, YES]}).encode() + b"\n"


def chat(*messages):
    return json.dumps({"messages": list(messages)}).encode() + b"\n"


CHAT_FILES = [
    ("list.jsonl", TALK + b'{"messages": {"role": "user"}}\n' + TALK, [(2, "messages must be a list")], ["Yes", "Yes"]),
    ("texts.jsonl", TALK + b'{"messages": ["Hi", "Yes"]}\n' + TALK, [(2, "messages must be a list")], ["Yes", "Yes"]),
    ("number.jsonl", TALK + chat(HI, YES | {"content": 7}), [(2, "message 2: content must be text, got int")], ["Yes"]),
    ("role.jsonl", TALK + chat(HI | {"role": "r" * 9999}, YES), [(2, "message 1: a message's role must be")], ["Yes"]),
    ("empty.jsonl", TALK + chat(HI, YES | {"content": ""}), [(2, "message 2: content is empty")], ["Yes"]),
    ("systems.jsonl", TALK + chat(SYSTEM, SYSTEM, HI, YES), [(2, "a conversation has at most one sys")], ["Yes"]),
    ("system.jsonl", chat(SYSTEM, HI, YES), [], ["Yes"]),
    ("half.jsonl", TALK + chat(HI, YES | {"content": "\ud800"}), [(2, "message 2: content is not valid Uni")], ["Yes"]),
    ("deep.jsonl", TALK + b'{"messages": ' + b"[" * 100_000 + b"\n", [(2, "malformed JSON: nested")], ["Yes"]),
    ("nested.parquet", parquet(pa.table({"messages": [[HI, YES], [HI]]})), [(2, "the assistant says noth")], ["Yes"]),
    (
        "bytes.parquet",
        parquet(pa.table({"messages": [[HI, YES], [HI, YES | {"content": "wrong!"}]]})).replace(
            b"wrong!", b"wron\xff!"
        ),
        [(2, "messages must be a list")],
        ["Yes"],
    ),
]

PAIR, SUM = b'{"prompt": "Hi", "response": "Yes"}\n', b'{"question": "Hi", "answer": "#### 7"}\n'
SNI_FILES = [
    ("a.jsonl", PAIR + b'{"prompt": "Hi"}\n' + PAIR, [(2, "no response here, only prompt")], ["Yes", "Yes"]),
    ("b.csv", b"response,prompt\nYes,Hi\n,Hi\nYes,Hi\n", [(2, "response is empty")], ["Yes", "Yes"]),
    ("c.parquet", parquet(pa.table({"prompt": ["Hi"], "response": [1]})), [(1, "response must be text, got int")], []),
]
GSM8K_FILES = [
    ("train.jsonl", SUM + b'{"question": "Hi", "answer": "seven"}\n' + SUM, [(2, "answer must")], ["#### 7"] * 2),
    ("train.csv", b"question,answer\nHi,#### 7\nHi,7\n", [(2, "answer must end in '#### <number>'")], ["#### 7"]),
]
VERBS = {"text": TEXT_FILES, "owt": TEXT_FILES[:3], "chat": CHAT_FILES, "sni": SNI_FILES, "gsm8k": GSM8K_FILES}


@pytest.fixture(scope="module")
def tokenizer_path(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("raw-input") / "story.model"
    tokenizer.save(path)
    return path


def written(folder, tokenizer):
    """What the documents of a prepared folder say: all of a text, of a conversation the assistant's words."""
    for ids, flags in documents_of(folder, "train"):
        yield tokenizer.decode(ids if flags is None else ids[flags == 1])


def commands(kind, given, tokenizer_path, out):
    options = [
        "--input",
        given,
        "--tokenizer_path",
        tokenizer_path,
        "--save_dir",
        out,
        "--val_fraction",
        "0",
        "--max_bad",
        1,
    ]
    return ["preprocess", kind, *map(str, options)]


def lay_out(kind, cases, folder):
    """The files of these cases in a new folder."""
    folder.mkdir(parents=True)
    for name, content, _, _ in cases:
        (folder / name).write_bytes(content)
    if kind == "gsm8k":
        (folder / "test.jsonl").write_bytes(SUM)
    return folder


def check(cases, folder, out, tokenizer):
    """Exactly the bad records of these cases are listed, and exactly the good ones written, in the files' order."""
    cases = sorted(cases)
    expected = [(str(folder / name), line, reason) for name, _, bad, _ in cases for line, reason in bad]
    listed = out / "bad_records.jsonl"
    found = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    assert [(record["path"], record["line"]) for record in found] == [(path, line) for path, line, _ in expected]
    for record, (path, _, reason) in zip(found, expected, strict=True):
        assert record["reason"].startswith(reason), path
        assert record["reason"].isprintable() and len(record["reason"]) < 320, path
    if good := [text for _, _, _, texts in cases for text in texts]:
        assert list(written(out, tokenizer)) == good
    return len(expected)


@pytest.mark.parametrize("kind", VERBS)
def test_each_bad_record_is_named_and_the_good_ones_survive(
    tmp_path, tokenizer_path, tokenizer, capsys, record_property, kind
):
    folder, out = lay_out(kind, VERBS[kind], tmp_path / "in"), tmp_path / "out"
    assert cli.main(commands(kind, folder, tokenizer_path, out)) == 0
    assert "Traceback" not in capsys.readouterr().err
    number = check(VERBS[kind], folder, out, tokenizer)
    record_property("figure", f"{kind}: {len(VERBS[kind])} files, {number} of {number} bad records named, 0 tracebacks")


def test_strict_stops_at_the_first_bad_record_in_one_line_that_names_it(tmp_path, tokenizer_path, capsys):
    for case in TEXT_FILES[::9]:
        stop(case, tmp_path, "text", tokenizer_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VERBS)
def test_each_file_alone_is_read_or_refused_and_strict_stops_at_it(
    tmp_path, tokenizer_path, tokenizer, capsys, record_property, kind
):
    for case in VERBS[kind]:
        folder, out = lay_out(kind, [case], tmp_path / case[0]), tmp_path / f"{case[0]} out"
        assert cli.main(commands(kind, folder, tokenizer_path, out)) == (0 if case[3] else 2), case[0]
        said = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in said), case[0]
        assert case[3] or said[-1].startswith("nanollm preprocess: nothing to train on: 0 documents"), case[0]
        check([case], folder, out, tokenizer)
        stop(case, tmp_path / "strict", kind, tokenizer_path, capsys)
    record_property("figure", f"{kind}: {len(VERBS[kind])} files one by one, 0 tracebacks")


def stop(case, tmp_path, kind, tokenizer_path, capsys):
    name, _, bad, _ = case
    folder = lay_out(kind, [case], tmp_path / name)
    words = commands(kind, folder, tokenizer_path, tmp_path / f"{name} out")
    assert cli.main([*words, "--strict"]) == (2 if bad else 0), name
    *progress, complaint = capsys.readouterr().err.splitlines()
    if bad:
        path, (line, reason) = folder / name, bad[0]
        assert complaint.startswith(f"nanollm preprocess: {path}{f':{line}' if line else ''}: {reason}"), name
        assert all(line.startswith("preprocess: ") for line in progress), name


def test_a_tokenizer_learns_from_the_good_records_and_its_report_names_the_bad_ones(tmp_path, capsys, record_property):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content, _, _ in TEXT_FILES:
        (corpus / name).write_bytes(content)
    (corpus / "zz-story.txt").write_bytes(STORY.read_bytes())
    out = tmp_path / "out"
    assert cli.main(["tokenizer", "--corpus", str(corpus), "--output_dir", str(out), "--vocab_size", "600"]) == 0
    said = capsys.readouterr().err
    assert f"bad records were skipped, the first: {corpus}" in said and "Traceback" not in said
    report = json.loads((out / "bpe_tokenizer.json").read_bytes())
    expected = [
        (f"{corpus / name}:{line}" if line else str(corpus / name), reason)
        for name, _, bad, _ in sorted(TEXT_FILES)
        for line, reason in bad
    ]
    assert report["bad_records"] == len(expected)
    for said, (where, reason) in zip(report["first_bad_records"], expected, strict=True):
        assert said.startswith(f"{where}: {reason}")
    assert report["documents"] == 1 + sum(len(good) for _, _, _, good in TEXT_FILES)
    record_property("figure", f"{len(TEXT_FILES)} files, {len(expected)} bad records named, 0 tracebacks")


# One byte of a Parquet file. Its pages have a sum if the writer asks for it, as here; its footer has none in any case.

SUMMED = parquet(pa.table({"id": list(range(40)), "text": MANY}), row_group_size=10, write_page_checksum=True)


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_byte_of_a_parquet_file_gives_no_text_that_was_not_there(tmp_path, record_property, every):
    path, places, found, silent = tmp_path / "a.parquet", range(0, len(SUMMED), every), 0, 0
    for place in places:
        path.write_bytes(with_bytes(SUMMED, place, bytes([SUMMED[place] ^ 1 << place % 8])))
        bad = []
        texts = list(read_texts([path], "text", bad.append))
        assert set(texts) <= set(MANY), place
        found += bool(bad)
        silent += not bad and texts != MANY
    figure = f"{len(places)} bytes flipped, {found} found, {len(places) - found - silent} without effect, {silent} that"
    record_property("figure", f"{figure} made rows of others (the format has no sum over its footer)")


# A line without end, here one that is 64 times as long as a line may be.

MEASURE = """
import re, sys
from pathlib import Path
from nanollm import cli
from nanollm.sources import files

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

for name, value in eval(sys.argv[1]).items():
    setattr(files, name, value)
small, large = eval(sys.argv[2])
assert [cli.main(words) for words in small] == [0] * len(small)
base = peak()
assert [cli.main(words) for words in large] == [0] * len(large)
sys.stdout.write(f"\\n{peak() - base}")
"""


def extra_bytes(small, large, limits):
    """By how many bytes a process that reads the large files is larger than it was after it had read the small ones."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc: what getrusage tells, a child has from its parent")
    asked = [[list(map(str, words)) for words in some] for some in (small, large)]
    command = [sys.executable, "-c", MEASURE, repr(limits), repr(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return int(done.stdout.splitlines()[-1])


LINE = STORY.read_bytes().replace(b"\n", b" ").replace(b'"', b"'").replace(b",", b"")


def write(path, size):
    """The story's words as a good record, and one of `size` bytes. Returns the path."""
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        if ".jsonl" in path.name:
            file.write(b'{"text": "' + LINE + b'"}\n{"text": "')
        else:
            file.write(b"text\n" + LINE + b"\n" + b'"' * path.name.endswith("quoted.csv"))
        unit = LINE + b"\n" * path.name.endswith("quoted.csv")
        for _ in range(size // len(unit) + 1):
            file.write(unit)
        file.write(b'"}\n{"text": "good two"}\n' if ".jsonl" in path.name else b"\ngood two\n")
    return path


def both_verbs(path, tokenizer_path):
    learn = ["tokenizer", "--corpus", path, "--output_dir", path.with_suffix(".tokenizer"), "--vocab_size", "400"]
    return [commands("text", path, tokenizer_path, path.with_suffix(".tokens")), learn]


def test_a_line_of_64_times_the_limit_is_reported_and_not_held(tmp_path, tokenizer_path, record_property):
    """With limits of a thirty-second of what they are."""
    limits = {name: getattr(files, name) // 32 for name in ("LINE_BYTES", "DOCUMENT_BYTES")}
    size = 64 * limits["LINE_BYTES"]
    small, large = [], []
    for kind in ("jsonl.gz", "quoted.csv"):
        small += both_verbs(write(tmp_path / f"small.{kind}", 9), tokenizer_path)
        large += both_verbs(write(tmp_path / f"large.{kind}", size), tokenizer_path)
    extra = extra_bytes(small, large, limits)
    assert extra < size
    record_property("figure", f"{size / 2**20:.0f} MiB in one line: {extra / 2**20:.0f} MiB more memory")
