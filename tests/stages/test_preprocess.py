"""Text of any source becomes the same token files, however often the job is stopped and by however many."""

import dataclasses
import gzip
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nanollm import cli
from nanollm.data.shards import Shards, ShardWriter, read_manifest
from nanollm.sources.gsm8k import extract_answer
from nanollm.sources.word_problems import WordProblems
from nanollm.stages.preprocess import Config, WordsConfig, run
from tests.conftest import STORY
from tests.data.conftest import content, documents_of


@pytest.fixture(scope="session")
def articles(tmp_path_factory):
    """A folder of .jsonl with 4,000 different documents and three bad lines."""
    folder = tmp_path_factory.mktemp("articles")
    words = STORY.read_text(encoding="utf-8").split()
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(5, 200)))}) for _ in range(4000)]
    lines[10], lines[2000], lines[3999] = "{", '{"body": ""}', '{"text": " "}'
    for part in range(4):
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines[part * 1000 : part * 1000 + 1000]) + "\n")
    return folder


def test_a_folder_of_text_becomes_token_files_and_a_few_lines_say_what(tmp_path, articles, tokenizer_path, capsys):
    out = tmp_path / "out"
    config = Config(kind="text", tokenizer_path=tokenizer_path, save_dir=out, input=[articles])
    assert run(config) == out
    said = capsys.readouterr().err
    train, val = (Shards.open(out, split, tokenizer_fingerprint=None) for split in ("train", "val"))
    assert train.documents + val.documents == 3997
    per_token = train.text_bytes / train.tokens_total
    assert f"train: {train.tokens_total:,} tokens in {train.documents:,} documents, {per_token:.2f} bytes" in said
    assert f"val: {val.tokens_total:,} tokens in {val.documents:,} documents" in said
    assert f"3 bad records were left out; {out / 'bad_records.jsonl'} lists them" in said
    bad = [json.loads(line) for line in (out / "bad_records.jsonl").read_text().splitlines()]
    assert [(Path(record["path"]).name, record["line"]) for record in bad] == [
        ("part-0.jsonl", 11),
        ("part-2.jsonl", 1),
        ("part-3.jsonl", 1000),
    ]


def test_an_empty_val_is_pointed_out(tmp_path, tokenizer_path, capsys):
    common = {"kind": "text", "tokenizer_path": tokenizer_path, "input": [STORY], "val_fraction": 0.0}
    run(Config(**common, save_dir=tmp_path / "out"))
    assert "val is empty, so training will measure nothing on it" in capsys.readouterr().err


# One file of text, the most natural source of all.

POEM = "".join(f"Line {n} of a long poem,\nand its second line.\n\n" for n in range(400))


def halves_of(text, folder, tokenizer_path, tokenizer, name="one.txt", **options):
    """The decoded documents of train and of val, for a folder with this one file in it."""
    (folder / "texts").mkdir(parents=True)
    (folder / "texts" / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    common = {"kind": "text", "tokenizer_path": tokenizer_path, "input": [folder / "texts"]}
    run(Config(**common, save_dir=folder / "out", **options))
    splits = json.loads((folder / "out" / "manifest.json").read_text())["splits"]
    return [
        [tokenizer.decode(ids) for ids, _ in documents_of(folder / "out", split)] if entry["tokens"] else []
        for split, entry in splits.items()
    ]


@pytest.mark.parametrize("name", ["one.txt", "one.txt.gz"])
def test_of_one_text_the_last_tenth_becomes_val_cut_between_paragraphs(tmp_path, tokenizer_path, tokenizer, name):
    (train,), (val,) = halves_of(POEM, tmp_path, tokenizer_path, tokenizer, name)
    assert train + val == POEM
    assert len(val) == pytest.approx(len(POEM) / 10, rel=0.02)
    assert val.startswith("Line 3")


def test_of_one_text_val_fraction_is_the_share_of_its_end(tmp_path, tokenizer_path, tokenizer):
    (train,), (val,) = halves_of(POEM, tmp_path / "a", tokenizer_path, tokenizer, val_fraction=0.5)
    assert train + val == POEM
    assert len(val) == pytest.approx(len(POEM) / 2, rel=0.02)
    assert halves_of(POEM, tmp_path / "b", tokenizer_path, tokenizer, val_fraction=0.0) == [[POEM], []]


@pytest.mark.parametrize(
    "text", ["word " * 2000, "x" * 10_000, "\u00e9\U0001f600" * 3000, "one line\n" + "y" * 9000, "ab"]
)
def test_one_text_without_borders_is_cut_where_it_can_be_and_nothing_is_lost(tmp_path, tokenizer_path, tokenizer, text):
    train, val = halves_of(text, tmp_path, tokenizer_path, tokenizer)
    assert "".join(train + val).strip() == text.strip()
    assert not val or len(val[0]) == pytest.approx(len(text) / 10, rel=0.6)


def test_one_text_in_many_pieces_comes_out_the_same_for_any_workers_and_kills(
    tmp_path, tokenizer_path, tokenizer, monkeypatch
):
    """A large .txt is read in pieces; a piece that is not UTF-8 is one bad record, not two."""
    monkeypatch.setattr("nanollm.sources.files.DOCUMENT_BYTES", 1000)
    content_of_file = POEM.encode()
    content_of_file = content_of_file[:3000] + b"\xff" + content_of_file[3000:]
    (tmp_path / "one.txt").write_bytes(content_of_file)
    common = {"kind": "text", "tokenizer_path": tokenizer_path, "input": [tmp_path / "one.txt"], "flush_every": 200}
    run(Config(**common, save_dir=tmp_path / "a"))
    expected = content(tmp_path / "a")
    manifest = json.loads(expected["manifest.json"])
    assert manifest["bad_records"] == 1
    assert manifest["source"]["held_out"] == 0.1
    assert manifest["splits"]["train"]["documents"] > 10
    run(Config(**common, save_dir=tmp_path / "b", num_workers=2))
    assert content(tmp_path / "b") == expected

    stops = iter(range(3, 40, 4))
    add = ShardWriter.add

    def dies(self, *args, **words):
        if next(countdown) == 0:
            raise KeyboardInterrupt
        add(self, *args, **words)

    monkeypatch.setattr(ShardWriter, "add", dies)
    for stop in stops:
        countdown = iter(range(stop, -1, -1))
        with suppress(KeyboardInterrupt, StopIteration):
            run(Config(**common, save_dir=tmp_path / "c"))
    monkeypatch.setattr(ShardWriter, "add", add)
    run(Config(**common, save_dir=tmp_path / "c"))
    assert content(tmp_path / "c") == expected


def test_with_val_input_all_of_one_text_is_train(tmp_path, tokenizer_path, tokenizer):
    (tmp_path / "held_out.txt").write_text("Something else.")
    val_input = [tmp_path / "held_out.txt"]
    assert halves_of(POEM, tmp_path, tokenizer_path, tokenizer, val_input=val_input) == [[POEM], ["Something else."]]


def test_of_several_texts_each_goes_to_one_side_as_a_whole(tmp_path, tokenizer_path, tokenizer):
    texts = [f"This is text {n}.\n" * 20 for n in range(30)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    out = tmp_path / "out"
    run(Config(kind="text", tokenizer_path=tokenizer_path, save_dir=out, input=[tmp_path], val_fraction=0.3))
    assert Counter(tokenizer.decode(ids) for split in ("train", "val") for ids, _ in documents_of(out, split)) == (
        Counter(texts)
    )


@pytest.mark.parametrize(("repeats", "is_little"), [(2, True), (120, False)])
def test_too_little_text_is_said_with_what_would_be_enough(
    tmp_path, tokenizer_path, tokenizer, capsys, repeats, is_little
):
    halves_of(POEM * repeats, tmp_path, tokenizer_path, tokenizer)
    said = capsys.readouterr().err
    assert ("kB of text is too little" in said) == ("from about 1 MB (200,000 words) on it learns" in said) == is_little


def test_an_empty_text_is_refused_without_advice_that_cannot_help(tmp_path, tokenizer_path, tokenizer):
    with pytest.raises(ValueError, match=r"1 of 1 records are bad, the first: .*one.txt: holds no records"):
        halves_of("", tmp_path, tokenizer_path, tokenizer)


def test_generated_problems_become_conversations_and_the_manifest_says_which(tmp_path, tokenizer_path, tokenizer):
    out = tmp_path / "out"
    options = ["--words.levels", "1", "3", "--words.largest", "12", "--words.count", "300", "--words.seed", "7"]
    paths = ["--tokenizer_path", str(tokenizer_path), "--save_dir", str(out)]
    assert cli.main(["preprocess", "words", *paths, *options, "--val_fraction", "0.2"]) == 0
    source = json.loads((out / "manifest.json").read_bytes())["source"]
    assert source == {"dataset": "words", "levels": [1, 3], "largest": 12, "seed": 7, "count": 300}
    problems = WordProblems(levels=(1, 3), largest=12, seed=7).problems("train")[:300]
    made = [document for split in ("train", "val") for document in documents_of(out, split)]
    lessons = [problems[place : place + 1 + (place % 5 == 3)] for place in range(300) if place % 5 != 4]
    expected = ["".join(each.question + each.answer for each in lesson) for lesson in lessons]
    assert sorted(tokenizer.decode(ids.tolist()) for ids, _ in made) == sorted(expected)
    trained = [tokenizer.decode(ids[flags == 1].tolist()) for ids, flags in made]  # both replies, no question
    assert sorted(trained) == sorted("".join(each.answer for each in lesson) for lesson in lessons)
    assert len(list(documents_of(out, "val"))) > 20
    with pytest.raises(ValueError, match="was begun with source count 300, this command has 301"):
        words = WordsConfig(levels=[1, 3], largest=12, seed=7, count=301)
        run(Config(kind="words", tokenizer_path=tokenizer_path, save_dir=out, val_fraction=0.2, words=words))


def test_a_problem_of_the_test_is_never_trained_on(tmp_path, tokenizer_path, tokenizer):
    """Also when the two files are named one by one."""
    for split, answer in (("train", "#### 1,080"), ("test", "#### -3.5%")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": f"A {split}?", "answer": answer}))
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for number, given in enumerate([files, [tmp_path]]):
        out = tmp_path / str(number)
        run(Config(kind="gsm8k", tokenizer_path=tokenizer_path, save_dir=out, input=given, val_fraction=0))
        for split, answer in (("train", "#### 1,080"), ("test", "#### -3.5%")):
            ((ids, flags),) = documents_of(out, split)
            assert tokenizer.decode(ids) == f"A {split}?{answer}"
            assert tokenizer.decode(ids[flags == 1]) == answer
    with pytest.raises(ValueError, match=r"gsm8k needs files named for their split .* none is named 'test'"):
        run(Config(kind="gsm8k", tokenizer_path=tokenizer_path, save_dir=tmp_path / "x", input=files[:1]))


@pytest.mark.long
@pytest.mark.realdata
def test_every_gsm8k_answer_survives_exactly(tmp_path, shared_data, tokenizer_path, tokenizer):
    run(Config(kind="gsm8k", tokenizer_path=tokenizer_path, save_dir=tmp_path, input=[shared_data / "gsm8k"]))
    total = 0
    for file, splits in (("train.jsonl", ["train", "val"]), ("test.jsonl", ["test"])):
        source = [
            json.loads(line)["answer"]
            for line in (shared_data / "gsm8k" / file).read_text(encoding="utf-8").splitlines()
        ]
        decoded = [
            tokenizer.decode(ids[flags == 1]) for split in splits for ids, flags in documents_of(tmp_path, split)
        ]
        assert Counter(decoded) == Counter(source)
        assert Counter(map(extract_answer, decoded)) == Counter(map(extract_answer, source))
        total += len(decoded)
    assert total == 8_792


# Killed.


LIMITS = {"shard_tokens": 50_000, "max_tokens_train": 500_000}


def start(articles, tokenizer_path, out, **options):
    options |= {"input": articles, "tokenizer_path": tokenizer_path, "save_dir": out, "flush_every": 3_000}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "nanollm", "preprocess", "text", *words], stderr=subprocess.PIPE)


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def wait_until(happened, process):
    """Until it has happened, or the process has done all its work."""
    deadline = time.monotonic() + 120
    while not happened() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened in two minutes"
        time.sleep(0.002)
    assert process.poll() in (None, 0), process.communicate()[1].decode()


def bytes_of(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.long), pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path, articles, tokenizer_path, kills):
    """With two workers; with one: faults/test_kills.py."""
    finish(start(articles, tokenizer_path, tmp_path / "whole", **LIMITS))
    out = tmp_path / "killed"
    progress = out / "progress.json"
    rng, struck, started = random.Random(2), 0, 0
    while struck < kills:
        started += 1
        assert started < 10 * kills, f"only {struck} kills struck"
        before = bytes_of(progress)
        process = start(articles, tokenizer_path, out, num_workers=2, **LIMITS)
        wait_until(
            lambda seen=before: bytes_of(progress) != seen, process
        )  # it is past its start, and has done new work
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None:
            struck += 1
            process.kill()
            process.communicate()
        else:
            finish(process)
        if not progress.exists() and (out / "manifest.json").exists():  # it was faster than the kill: begin again
            assert content(out) == content(tmp_path / "whole")
            for path in out.iterdir():
                path.unlink()
    finish(start(articles, tokenizer_path, out, num_workers=2, **LIMITS))
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_workers_end_with_their_parent(tmp_path, articles, tokenizer_path):
    process = start(articles, tokenizer_path, tmp_path / "out", num_workers=2)
    wait_until((tmp_path / "out" / "train-00000.npy").exists, process)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert workers
    deadline = time.monotonic() + 20
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_stays_flat(tmp_path, tokenizer_path, workers):
    """Ten times the text, and at most 30 MB more in the largest process."""
    story = STORY.read_text(encoding="utf-8")[:5000]
    code = (
        "import resource as r; from nanollm.cli import main; assert main() == 0; "
        "print(max(r.getrusage(who).ru_maxrss for who in (r.RUSAGE_SELF, r.RUSAGE_CHILDREN)))"
    )
    peaks = []
    for documents in (4_000, 40_000):
        file, out = tmp_path / f"{documents}.jsonl", tmp_path / str(documents)
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": f"{n} {story}"}) + "\n" for n in range(documents))
        paths = ["--input", file, "--tokenizer_path", tokenizer_path, "--save_dir", out]
        command = [sys.executable, "-c", code, "preprocess", "text", *paths, "--num_workers", str(workers)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        peaks.append(int(output.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks


# What the user gets wrong.


def test_missing_and_empty_files_and_folders_that_cannot_be_written_are_reported(tmp_path, tokenizer_path):
    def prepare(file, save_dir=tmp_path / "out"):
        run(Config(kind="text", tokenizer_path=tokenizer_path, save_dir=save_dir, input=[file]))

    with pytest.raises(FileNotFoundError, match=r"nowhere.txt does not exist"):
        prepare(tmp_path / "nowhere.txt")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match=r"1 of 1 records are bad, the first: .*empty.jsonl: holds no records"):
        prepare(empty)
    for in_the_way in (empty, empty / "below a file"):
        with pytest.raises(OSError, match=rf"cannot write to {re.escape(str(in_the_way))} \(.*\); .* --save_dir"):
            prepare(STORY, save_dir=in_the_way)
    prepare(STORY)  # into the folder where the empty file failed


def test_files_named_for_a_split_are_that_split(tokenizer_path, tmp_path, capsys):
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in ("train", "test", "validation"):
        rows = [json.dumps({"text": f"This is {name} text, number {number}."}) for number in range(20)]
        (folder / f"{name}-00000-of-00001.jsonl").write_text("\n".join(rows))
    run(Config(kind="text", input=[folder], tokenizer_path=tokenizer_path, save_dir=tmp_path / "out"))
    manifest, _ = read_manifest(tmp_path / "out")
    assert {name: entry["documents"] for name, entry in manifest["splits"].items()} == {"train": 20, "val": 20}
    assert "left out what is named test (1)" in capsys.readouterr().err


def test_above_a_share_of_bad_records_the_command_asks_and_then_goes_on(tokenizer_path, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' * 8 + '{"txt": 1}\n' * 2)
    c = Config(kind="text", input=[tmp_path / "in.jsonl"], tokenizer_path=tokenizer_path, save_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"2 of 10 records are bad, the first: .*in.jsonl:9: no text.*--max_bad 1"):
        run(c)
    run(dataclasses.replace(c, max_bad=0.2))
    assert read_manifest(tmp_path / "out")[0]["bad_records"] == 2


def test_an_edit_of_equal_length_is_noticed(tokenizer_path, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "The sea is calm"}\n')
    c = Config(kind="text", input=[tmp_path / "in.jsonl"], tokenizer_path=tokenizer_path, save_dir=tmp_path / "out")
    run(c)
    (tmp_path / "in.jsonl").write_text('{"text": "The sea is wild"}\n')
    with pytest.raises(ValueError, match="files"):
        run(c)


def test_without_tools_it_does_not_wait_for_torch(tokenizer_path, tmp_path):
    code = (
        "import sys; from nanollm.cli import main; sys.argv[0] = 'nanollm'; assert main() == 0; "
        "assert 'torch' not in sys.modules"
    )
    (tmp_path / "in.jsonl").write_text('{"text": "Once upon a time"}\n' * 5)
    words = ["preprocess", "text", "--input", tmp_path / "in.jsonl", "--tokenizer_path", tokenizer_path]
    subprocess.run([sys.executable, "-c", code, *words, "--save_dir", tmp_path / "out"], check=True)
