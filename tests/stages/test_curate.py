"""Text of the web becomes token files without what repeats, what is no prose and what an evaluation asks."""

import gzip
import json
import os
import random
import stat
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from nanollm.curate.config import Config, EvalsConfig, FilterConfig, SlurmConfig
from nanollm.data.shards import Shards
from nanollm.stages.curate import plan, run
from tests.conftest import STORY
from tests.data.conftest import documents_of
from tests.evals.test_contamination import QUESTION

pytest.importorskip("datatrove", reason='datatrove is not installed: pip install -e ".[data]"')
# datatrove starts a Manager by fork, from Python 3.12 on with this warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

TASKS = 3


@pytest.fixture(scope="module")
def web(tmp_path_factory, tokenizer):
    """A folder with texts, and what each of them is there for."""
    folder = tmp_path_factory.mktemp("web")
    words = [word for word in STORY.read_text(encoding="utf-8").split() if word.isalpha()]
    words += ["the", "and", "of", "that", "with"] * (len(words) // 40)  # as often as people write them
    rng = random.Random(0)
    good = [" ".join(rng.choices(words, k=rng.randrange(60, 150))) for _ in range(30)]
    texts = {
        "good": good,
        "exact": [good[0], good[0], good[7]],
        "near": [f"{good[3]} and a word more", f"Copied: {good[3]}"],
        "contaminated": [" ".join(rng.choices(words, k=70)) + f"\n{QUESTION.upper()}\n" + "And of the end."],
        "short": [" ".join([*dict.fromkeys(words)][-45:])],
        "repeating": ["The same line again and again, of the kind.\n" * 40],
    }
    everything = [text for some in texts.values() for text in some]
    rng.shuffle(everything)
    for number in range(2):
        lines = [json.dumps({"text": text}) for text in everything[number::2]]
        (folder / f"{number}.jsonl").write_text("\n".join([*lines, *["{broken"] * number]))
    evals = folder / "evals"
    evals.mkdir()
    (evals / "test.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in ("What is it?", QUESTION)))
    (evals / "train.jsonl").write_text(json.dumps({"question": good[5]}))
    tokenizer.save(folder / "tokenizer" / "story.model")
    return types.SimpleNamespace(folder=folder, texts=texts, inputs=[str(folder / "0.jsonl"), str(folder / "1.jsonl")])


@pytest.fixture
def config(web, tmp_path):
    """A Config for the web, with other options where given."""

    def make(**options):
        common = {"input": web.inputs, "tokenizer_path": web.folder / "tokenizer", "save_dir": tmp_path / "out"}
        common |= {"tasks": TASKS, "val_fraction": 0.1}
        common |= {"evals": EvalsConfig(input=[str(web.folder / "evals")])}
        return Config(**common | options)

    return make


@pytest.fixture(scope="module")
def curated(web, tmp_path_factory):
    """The folder that one plain run makes."""
    out = tmp_path_factory.mktemp("curated") / "out"
    evals = EvalsConfig(input=[str(web.folder / "evals")])
    common = {"tokenizer_path": web.folder / "tokenizer", "save_dir": out, "input": web.inputs, "tasks": TASKS}
    run(Config(**common, val_fraction=0.1, evals=evals))
    return out


def content(folder):
    """All that must be the same however it came about: everything but datatrove's logs."""
    files = (path for path in folder.rglob("*") if path.is_file() and "logs" not in path.relative_to(folder).parts)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != ".lock"}
    return {name: gzip.decompress(raw) if name.endswith(".gz") else raw for name, raw in found.items()}


def texts_of(folder, tokenizer):
    return [tokenizer.decode(ids) for split in ("train", "val") for ids, _ in documents_of(folder, split)]


def listed(folder, name):
    files = sorted((folder / "curation" / "removed" / name).glob("*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.open(file)]


# What stays, and what is listed.


def test_each_good_text_stays_once(curated, web, tokenizer):
    kept = Counter(texts_of(curated, tokenizer))
    assert set(kept.values()) == {1}
    assert kept.total() == len(web.texts["good"])
    assert len(set(web.texts["good"]) & kept.keys()) >= len(web.texts["good"]) - 3  # or its near duplicate, for one


def test_of_duplicates_the_others_are_listed(curated, web):
    repeated = Counter(web.texts["exact"]) + Counter(web.texts["near"]) + Counter(web.texts["good"])
    found = Counter(record["text"] for record in listed(curated, "duplicates"))
    assert found.total() == 5 and found <= repeated


def test_what_an_evaluation_asks_is_listed_with_question_and_n_gram(curated, web):
    (record,) = listed(curated, "contaminated")
    assert record["text"] == web.texts["contaminated"][0]
    assert record["questions"] == [
        {
            "where": "test.jsonl, 2",
            "text": QUESTION,
            "share": 1.0,
            "ngram": "natalia sold clips to 48 of her friends in april and then she",
        }
    ]


@pytest.mark.parametrize(
    ("name", "what", "reason"),
    [("gopher_quality", "short", "gopher_short_doc"), ("gopher_repetition", "repeating", "dup_line_frac")],
)
def test_what_a_filter_removed_is_listed_with_its_reason(curated, web, name, what, reason):
    assert [(each["text"], each["filter_reason"]) for each in listed(curated, name)] == [(web.texts[what][0], reason)]


def test_manifest_and_curation_count_what_was_removed(curated, web):
    manifest = json.loads((curated / "manifest.json").read_bytes())
    figures = manifest["curation"]
    documents = sum(map(len, web.texts.values()))
    assert figures["documents"] == {"read": documents, "kept": len(web.texts["good"])}
    assert figures["removed"] == {
        "contaminated": {"question": 1},
        "duplicates": {"duplicates": 5},
        "gopher_quality": {"gopher_short_doc": 1},
        "gopher_repetition": {"dup_line_frac": 1},
    }
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(web.texts["good"])
    assert (manifest["bad_records"], manifest["parts"]) == (1, TASKS)
    assert [path.name for path in curated.iterdir() if path.is_dir()] == ["curation"]
    names = {path.name for path in (curated / "curation").iterdir()} - {".lock"}
    assert names == {"logs", "questions.json", "removed", "settings.json"}


def test_each_step_can_be_left_out(config, web, tokenizer):
    off = {"filters": FilterConfig(gopher_repetition=False, gopher_quality=False), "dedup": False}
    c = config(**off, tasks=2, evals=EvalsConfig(enabled=False))  # a file for each task
    run(c)
    assert Counter(texts_of(c.save_dir, tokenizer)) == Counter(text for some in web.texts.values() for text in some)


def test_c4_takes_lines_out(config, tmp_path, tokenizer):
    page = "This is a sentence of some words. Here is another one! Is this the third? Yes, it is.\n\nAnd the last one."
    lines = ["We use cookies on this page.", "Two words", "Please turn Javascript on for this."]
    (tmp_path / "web.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("\n".join([lines[0], page, *lines[1:]]), "int main() {"))
    )
    filters = FilterConfig(gopher_repetition=False, gopher_quality=False, c4=True)
    c = config(input=[str(tmp_path / "web.jsonl")], filters=filters, val_fraction=0.0, tasks=1)
    run(c)
    shards = Shards.open(c.save_dir, tokenizer_fingerprint=None)
    assert tokenizer.decode(shards.read(0, shards.tokens_total)) == page.replace("\n\n", "\n")
    assert [record["filter_reason"] for record in listed(c.save_dir, "c4")] == ["curly_bracket"]


def test_input_may_lie_elsewhere(config, web, curated, tokenizer):
    import fsspec

    store = fsspec.filesystem("memory")
    for path in map(Path, web.inputs):
        store.pipe(f"/web/{path.name}", path.read_bytes())
    c = config(input=["memory://web"])
    run(c)
    assert sorted(texts_of(c.save_dir, tokenizer)) == sorted(texts_of(curated, tokenizer))
    store.store.clear()


# Again, and stopped.


def test_what_is_done_is_not_done_again(curated, config, capsys):
    before = content(curated)
    assert run(config(save_dir=curated)) == curated
    said = capsys.readouterr().err
    assert "already prepared" in said and "30 of 38 documents kept" in said
    assert content(curated) == before


def test_other_settings_are_refused(curated, config):
    for options, named in [
        ({"tasks": 2}, "with source tasks 3, this command has 2"),
        ({"filters": FilterConfig(min_words=9)}, "with source filters min_words 50, this command has 9"),
        ({"evals": EvalsConfig(enabled=False)}, "with source evals questions 2, this command has 0"),
        ({"seed": 1}, "with rules seed 0, this command has 1"),
    ]:
        with pytest.raises(ValueError, match=named):
            run(config(save_dir=curated, **options))


def test_stopped_anywhere_it_ends_in_the_same_bytes(config, curated, monkeypatch):
    """Before some of the moments in which something is made safe on the disk, or a file of a part is moved."""
    expected, c, left, stops = content(curated), config(), [0], 0

    def stoppable(call):
        def counted(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return call(*args, **options)

        return counted

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, stoppable(getattr(os, name)))
    for calls in range(5, 1000, 6):
        left[0] = calls
        try:
            run(c)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 5
    left[0] = 10**9
    assert content(c.save_dir) == expected


@pytest.mark.dist
def test_two_processes_write_what_one_writes(config, curated):
    c = config(workers=2)
    run(c)
    assert content(c.save_dir) == content(curated)


@pytest.mark.dist
def test_ray_writes_what_one_process_writes(config, curated):
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    c = config()
    words = ["--executor", "ray", "--workers", "2", "--mem_gb", "1"]
    assert command(c, *words).returncode == 0
    assert content(c.save_dir) == content(curated)


@pytest.mark.dist
@pytest.mark.skipif(os.name == "nt", reason="Slurm does not run on Windows")
def test_slurm_writes_what_one_process_writes(config, curated, tmp_path, monkeypatch):
    """With an sbatch that runs each task at once."""
    programs = {
        "sbatch": """
            array=$(grep -oE 'array=0-[0-9]+' "${@: -1}" | grep -oE '[0-9]+$')
            for task in $(seq 0 $array); do
                SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "${@: -1}" >&2 || exit 1
            done
            echo Submitted batch job 7
        """,
        "srun": 'exec "${@: -2}"',
        "scontrol": "echo here",
    }
    for name, lines in programs.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{lines}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    c = config()
    words = ["--executor", "slurm", "--slurm.partition", "cpu"]
    done = command(c, *words)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Slurm has the jobs, the last is 7" in done.stderr
    assert content(c.save_dir) == content(curated)
    assert command(c, *words).stdout == f"{c.save_dir}\n"


def command(c, *words):
    """The command line of a config, in a process of its own."""
    options = {"tokenizer_path": c.tokenizer_path, "save_dir": c.save_dir, "tasks": c.tasks}
    options |= {"val_fraction": c.val_fraction, "evals.input": c.evals.input[0]}
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, "-m", "nanollm", "curate", *line, "--input", *c.input, *words],
        capture_output=True,
        text=True,
        check=False,
    )


# What the user gets wrong.


def test_a_dry_run_says_what_would_be_done(config):
    said = plan(config())
    assert "2 files of" in said and "2 questions to be left out; filter (3 tasks), buckets (14 tasks)" in said
    assert not config().save_dir.exists()


def test_what_cannot_begin_is_one_line(config, web, tmp_path):
    evals = EvalsConfig(input=[str(web.folder / "evals" / "test.jsonl")], column="q")
    for options, complaint in [
        ({"input": [str(tmp_path / "nowhere")]}, "nowhere does not exist"),
        ({"evals": evals}, r"no question in .*test.jsonl: name their column with --evals.column, now 'q'"),
        (
            {"evals": EvalsConfig()},
            r"cannot open the dataset openai/gsm8k .*--evals.input FILE ..., or --evals.enabled",
        ),
        (
            {"filters": FilterConfig(language="en")},
            "filters.language needs fastText: pip install fasttext-numpy2-wheel",
        ),
    ]:
        with pytest.raises((ValueError, OSError), match=complaint):
            run(config(**options))


def test_slurm_without_sbatch_is_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--executor slurm needs sbatch; start it where jobs are submitted"):
        run(config(executor="slurm", slurm=SlurmConfig(partition="cpu")))


def test_nothing_left_says_what_took_it(config):
    with pytest.raises(
        ValueError, match=r"nothing to train on: 0 of 38 documents kept; removed by gopher_quality 37, "
    ):
        run(config(filters=FilterConfig(min_words=9_999)))


def test_a_wrong_column_is_named(config):
    with pytest.raises(
        ValueError, match=r"0 of 0 documents kept; .* bad records, the first: .*no body here, only text"
    ):
        run(config(text_column="body"))


def test_a_folder_of_others_is_refused(config):
    c = config()
    c.save_dir.mkdir()
    (c.save_dir / "train-00000.npy").touch()
    with pytest.raises(ValueError, match=r"train-00000.npy is not of curate; give an empty or a new folder"):
        run(c)
