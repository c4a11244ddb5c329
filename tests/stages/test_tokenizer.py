"""A tokenizer is learned from any corpus, measured on text it has not seen, and never overwritten."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanollm import cli
from nanollm.durable import lock_folder
from nanollm.sources import builtin
from nanollm.stages.tokenizer import Config, HeldOut, plan, run
from nanollm.text.tokenizer import Tokenizer
from tests.conftest import STORY


@pytest.fixture
def corpus(tmp_path):
    """The paragraphs of the story, many times over with a number each, as .jsonl."""
    paragraphs = STORY.read_text(encoding="utf-8").split("\n\n")
    rows = [json.dumps({"text": f"{n}. {paragraph}"}) for n in range(20) for paragraph in paragraphs]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def config(source, folder, **changes) -> Config:
    return Config(**{"corpus": [str(source)], "output_dir": folder, "vocab_size": 500, "held_out": 0.1} | changes)


def report_of(model) -> dict:
    return json.loads(model.with_suffix(".json").read_text(encoding="utf-8"))


def test_it_writes_a_model_and_a_report_on_text_it_has_not_seen(corpus, tmp_path):
    model = run(config(corpus, tmp_path / "out", model_name="mine", model_type="unigram"))
    tokenizer, report = Tokenizer.load(model), report_of(model)
    assert model == tmp_path / "out" / "mine.model"
    assert sorted(path.name for path in model.parent.iterdir()) == [".lock", "mine.json", "mine.model"]
    assert report["fingerprint"] == tokenizer.fingerprint
    assert report["vocab_size"] == tokenizer.vocab_size == 500
    assert report["documents"] == len(corpus.read_text().splitlines())
    assert report["measured_on"] == "held-out text"
    assert report["bytes_seen"] == report["bytes_sampled"]
    assert report["bytes"] == pytest.approx(0.1 * (report["bytes_seen"] + report["bytes"]), rel=0.5)
    assert 1.5 < report["bytes_per_token"] == round(report["bytes"] / report["tokens"], 4) < 4
    assert report["settings"]["model_type"] == "unigram"


def test_the_same_command_gives_the_same_bytes_and_the_seed_matters(corpus, tmp_path):
    models = [run(config(corpus, tmp_path / str(n), seed=seed, sample_bytes=9000)) for n, seed in enumerate([5, 5, 6])]
    first, again, other = (model.read_bytes() for model in models)
    assert first == again != other
    assert report_of(models[0])["bytes_sampled"] <= 9000 < report_of(models[0])["bytes_seen"]


def test_a_hub_dataset_and_its_column_are_read(tmp_path):
    pytest.importorskip("datasets", reason='datasets is not installed: pip install -e ".[data]"')
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "dataset").mkdir()
    texts = STORY.read_text(encoding="utf-8").split("\n\n") * 3
    pq.write_table(pa.table({"body": texts}), tmp_path / "dataset" / "train-00000-of-00001.parquet")
    source = {"corpus": [], "dataset_name": str(tmp_path / "dataset")}
    model = run(config(None, tmp_path / "out", **source, text_column="body"))
    assert report_of(model)["documents"] == len(texts)
    with pytest.raises(ValueError, match="has no column text, only body; choose with --text_column"):
        run(config(None, tmp_path / "other", **source))


def test_the_builtin_corpus_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "documents", lambda: iter([STORY.read_text(encoding="utf-8")]))
    report = report_of(run(config("builtin", tmp_path)))
    assert report["documents"] == 1
    assert report["measured_on"] == "training text"  # one document cannot be held out


def test_a_corpus_without_a_usable_record_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(
        ValueError, match=r"no record of the corpus is usable; 1 bad, the first:.*a\.jsonl:1: no text here, only body"
    ):
        run(config(tmp_path / "a.jsonl", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_held_out_text_is_never_trained_on():
    documents = [f"document {n % 500}" for n in range(1000)]  # each twice
    split = HeldOut(0.2, seed=0)
    trained = set(split.training(iter(documents)))
    assert 60 < len(set(split.texts)) < 140
    assert trained.isdisjoint(split.texts)
    assert trained | set(split.texts) == set(documents)
    assert split.documents == 1000


def test_no_more_is_held_out_than_is_needed(monkeypatch):
    monkeypatch.setattr("nanollm.stages.tokenizer.HELD_OUT_BYTES", 100)
    split = HeldOut(0.5, seed=0)
    list(split.training(f"document {n:4}" for n in range(1000)))
    assert 87 <= sum(map(len, split.texts)) <= 100


def test_a_folder_that_is_read_only_is_told_before_anything_is_read(corpus, tmp_path, monkeypatch, capsys):
    def forbid(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", forbid)
    monkeypatch.setattr("nanollm.stages.tokenizer.find_files", pytest.fail)
    assert cli.main(["tokenizer", "--corpus", str(corpus), "--output_dir", str(tmp_path)]) == 2
    said = f"nanollm tokenizer: cannot write to {tmp_path} (Permission denied); choose another --output_dir\n"
    assert capsys.readouterr() == ("", said)


def test_a_tokenizer_that_is_there_is_returned_to_the_same_settings(corpus, tmp_path, monkeypatch, capsys):
    model = run(config(corpus, tmp_path / "out"))
    before = model.read_bytes()
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.setattr("nanollm.stages.tokenizer.train_on", pytest.fail)
    same = config(corpus, tmp_path / "moved")
    assert run(same).read_bytes() == before
    assert "was trained with these settings before; nothing to do" in capsys.readouterr().err
    assert "nothing to do" in plan(same)


def test_a_tokenizer_that_is_there_is_never_overwritten_by_another(corpus, tmp_path):
    model = run(config(corpus, tmp_path / "out"))
    before = model.read_bytes()
    for step in (run, plan):
        with pytest.raises(ValueError, match=r"made with vocab_size 500, .* has 510; .* --model_name or --output_dir"):
            step(config(corpus, tmp_path / "out", vocab_size=510))
    model.write_bytes(before + b"\x1a\x00")  # someone else's, beside our report
    with pytest.raises(ValueError, match="exists already, made in another way"):
        run(config(corpus, tmp_path / "out"))
    model.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="exists already, made in another way"):
        run(config(corpus, tmp_path / "out"))
    assert run(config(corpus, tmp_path / "out", model_name="other", vocab_size=510)).exists()
    assert model.read_bytes() == before + b"\x1a\x00"


@pytest.mark.parametrize("killed_at", ["nanollm.stages.tokenizer.write_json", "nanollm.text.tokenizer.write_file"])
def test_killed_before_a_file_is_written_the_same_command_trains_it(corpus, tmp_path, monkeypatch, killed_at):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(killed_at, kill)
        run(config(corpus, tmp_path / "out"))
    assert Tokenizer.load(run(config(corpus, tmp_path / "out"))).vocab_size == 500


def test_the_original_command_line_works(corpus, tmp_path):
    command = [sys.executable, "-m", "nanollm", "tokenizer", "--corpus", str(corpus), str(corpus)]
    options = ["--output_dir", str(tmp_path), "--model_type", "bpe", "--model_name", "bpe_tokenizer"]
    done = subprocess.run([*command, *options, "--vocab_size", "60000"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--vocab_size" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    options += ["--vocab_size", "500"]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'bpe_tokenizer.model'}\n"), done.stderr


def test_the_builtin_corpus_and_files_are_learned_from_together(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "documents", lambda: iter(["the documentation says nothing of it " * 40]))
    (tmp_path / "mine.txt").write_text("zyzzyva " * 400)
    c = Config(
        corpus=["builtin", str(tmp_path / "mine.txt")], output_dir=tmp_path / "out", vocab_size=310, held_out=0.0
    )
    said = plan(c)
    assert "bpe tokenizer of 310 pieces" in said and "the built-in corpus and 1 files with 0.0 MB" in said
    assert str(tmp_path / "out" / "bpe_tokenizer.model") in said
    assert not (tmp_path / "out").exists()
    learned = Tokenizer.load(run(c))
    assert len(learned.encode("zyzzyva")) <= 3
    assert len(learned.encode(" documentation")) < 12


def test_a_corpus_that_changed_since_is_noticed(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "sea.txt").write_text("The sea is wide and the sea is deep. " * 50)
    c = Config(corpus=[str(corpus)], output_dir=tmp_path / "t", vocab_size=300)
    model = run(c)
    assert run(c) == model
    (corpus / "sea.txt").write_text("The sea is wide and the sky is deep. " * 50)
    with pytest.raises(ValueError, match="from files that were changed, added or removed since"):
        run(c)


def test_of_two_commands_in_one_folder_the_second_is_refused(tmp_path):
    (tmp_path / "sea.txt").write_text("The sea is wide and the sea is deep. " * 50)
    with lock_folder(tmp_path / "t"), pytest.raises(ValueError, match="in use by another process"):
        run(Config(corpus=[str(tmp_path / "sea.txt")], output_dir=tmp_path / "t", vocab_size=280))


def test_rare_characters_are_spelled_in_bytes_below_a_coverage_of_1(tmp_path):
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 600)))
    text = "".join(character * (1 if place > 60 else 900) for place, character in enumerate(characters))
    (tmp_path / "zh.txt").write_text(text)
    c = Config(corpus=[str(tmp_path / "zh.txt")], output_dir=tmp_path / "t", vocab_size=400)
    with pytest.raises(ValueError, match=r"need a vocab_size of at least \d+.*--character_coverage"):
        run(c)
    tokenizer = Tokenizer.load(run(dataclasses.replace(c, character_coverage=0.9)))
    assert tokenizer.decode(tokenizer.encode(characters)) == characters
