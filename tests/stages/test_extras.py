"""A verb that lacks a package of an extra says in one line what to type."""

import sys
import tomllib
from pathlib import Path

import pytest

from nanollm import cli, extras
from nanollm.train.metrics import start_tracker

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
FOR_DEVELOPERS = {"bench", "docs", "dev"}  # no verb asks for them
CURATE = "curate --input x.jsonl --tokenizer_path BUNDLE --save_dir out"
PREPROCESS = "preprocess text --tokenizer_path BUNDLE --save_dir out"
TYPED = [  # an extra, a package of it, what is typed, and how the line begins
    ("serve", "fastapi", "serve BUNDLE", "nanollm serve: serve needs the package fastapi; "),
    ("serve", "uvicorn", "serve BUNDLE", "nanollm serve: serve needs the package uvicorn; "),
    ("serve", "prometheus_client", "serve BUNDLE", "nanollm serve: serve needs the package prometheus_client; "),
    ("export", "gguf", "export BUNDLE", "nanollm export: export needs the package gguf; "),
    ("eval", "lm_eval", "eval BUNDLE --harness hellaswag", "nanollm eval: --harness needs the package lm_eval; "),
    ("completion", "shtab", "--completion bash", "nanollm: --completion needs the package shtab; "),
    ("data", "datatrove", CURATE, "nanollm curate: curate needs the package datatrove; "),
    ("data", "regex", CURATE, "nanollm curate: curate needs the package regex; "),
    ("data,ray", "ray", f"{CURATE} --executor ray", "nanollm curate: curate needs the package ray; "),
    (
        "data",
        "datasets",
        f"{PREPROCESS} --dataset_name a/b",
        "nanollm preprocess: datasets is needed to read a/b from ",
    ),
    ("data", "pyarrow", f"{PREPROCESS} --input x.parquet", "nanollm preprocess: pyarrow is needed to read Parquet; "),
    ("data", "pyarrow", f"{PREPROCESS} --input x.jsonl.zst", "nanollm preprocess: pyarrow is needed to read .zst "),
]
CALLED = [  # the same for what a verb reaches late: an extra, a package of it, who says so, and a call
    ("track", "wandb", "tracker wandb", lambda folder: start_tracker("wandb", folder, {})),
    ("track", "trackio", "tracker trackio", lambda folder: start_tracker("trackio", folder, {})),
    ("track", "tensorboard", "tracker tensorboard", lambda folder: start_tracker("tensorboard", folder, {})),
]
LATE = (
    "nanollm.serve.",
    "nanollm.evals.benchmarks",
    "nanollm.evals.lm_eval",
    "torch.utils.tensor",
)


@pytest.fixture
def without(monkeypatch):
    """Make a package one that is not installed, also for what has been imported with it."""

    def block(package):
        for name in [name for name in sys.modules if name.startswith(LATE)]:
            monkeypatch.delitem(sys.modules, name)
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return block


@pytest.mark.parametrize(("extra", "package", "words", "begin"), TYPED)
def test_a_verb_without_its_extra_says_what_to_type(
    bundle, tmp_path, without, monkeypatch, capfd, extra, package, words, begin
):
    monkeypatch.chdir(tmp_path)
    for name in ("x.jsonl", "x.parquet", "x.jsonl.zst"):
        Path(name).touch()
    without(package)
    assert cli.main(words.replace("BUNDLE", str(bundle)).split()) == 2
    err = capfd.readouterr().err
    last = err.splitlines()[-1]  # before it preprocess says how far it came
    assert last.startswith(begin)
    assert last.endswith(f'; in the folder of NanoLLM: pip install -e ".[{extra}]"')
    assert "Traceback" not in err


@pytest.mark.parametrize(("extra", "package", "who", "call"), CALLED)
def test_what_needs_an_extra_late_says_so_in_the_same_words(tmp_path, without, extra, package, who, call):
    without(package)
    with pytest.raises(ValueError, match=rf'^{who} needs the package \S+; .*: pip install -e "\.\[{extra}\]"$'):
        call(tmp_path)


def test_every_extra_is_asked_for_by_a_verb_or_by_developers():
    tried = {extra for row in (*TYPED, *CALLED) for extra in row[0].split(",")}
    assert tried | FOR_DEVELOPERS == EXTRAS.keys()


def test_outside_a_checkout_the_line_names_the_distribution(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    said = str(extras.missing_package("serve", "fastapi", "serve"))
    assert said == 'serve needs the package fastapi; pip install "nanollm-lab[serve]"'
