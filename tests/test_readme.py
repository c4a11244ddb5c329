"""Does the README, followed word by word, do what it says?

Every command of its code blocks must fall under a rule of RULES: run as it is, run with words changed so that hours
become seconds, or refused with a reason. A new command that no rule knows fails a test, and so does a rule that no
command needs. By default each command is read in full by its verb; the slow test runs them all, in order, in a folder
that holds nothing but configs/ and some text.
"""

import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nanollm import cli
from nanollm.config import parse_options
from nanollm.sources import builtin

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TIMEOUT_S = 600
PROGRAMS = {
    "nanollm": ["-m", "nanollm"],
    "torchrun": ["-m", "torch.distributed.run"],
}
"""How the Python of these tests runs what the README calls so."""


@dataclass(frozen=True)
class Rule:
    """What becomes of the commands that begin so; the rule with the longest beginning counts."""

    begins: str
    more: str = ""
    """Words behind the command: of an option that is given twice, the last counts."""
    instead: dict[str, str] = field(default_factory=dict)
    """Words of the command, and what stands there when it is run here."""
    refused: str = ""
    """Why it is not run."""


SMALL = "--model nano-1m --model.vocab_size 4096 --train.steps 2 --train.batch_size 4 --train.micro_batch_size 2"
TEXTS = "--corpus my_texts/ --vocab_size 4096"
ROAD = "nanollm pretrain --config configs/pretrain/nano-327m.yaml"
RULES = (
    Rule(
        "make demo",
        more="--steps 4 --sft_steps 2 --grpo_steps 1 --exam 4",
        instead={"make demo": "nanollm demo"},  # which is what make.py runs when the environment is there
    ),
    Rule("make test", refused="this test is one of them"),
    Rule("py make.py", refused="the same two commands, as Windows calls them"),
    Rule("pip install", refused="it changes the environment; whether the extra exists is another test"),
    Rule("nanollm tokenizer --dataset_name", instead={"--dataset_name Elriggs/openwebtext-100k": ""}, more=TEXTS),
    Rule("nanollm preprocess owt", instead={"--num_workers 8": "--num_workers 2"}, more="--input my_texts/"),
    Rule("nanollm pretrain --model nano-1m", more="--train.steps 2"),
    Rule("nanollm pretrain --model nano-5m", more="--train.steps 2"),
    Rule(ROAD, more=SMALL),
    Rule("torchrun", instead={"--nproc-per-node 8": "--nproc-per-node 2"}, more=f"{SMALL} --out runs/several"),
    Rule("nanollm sft", more="--train.steps 1"),
    Rule("nanollm grpo", more="--train.steps 1 --validation_problems 4"),
    Rule("nanollm eval", more="--n 4"),
)
AS_THEY_ARE = (
    *("tokenizer --corpus", "preprocess text", "preprocess words", "preprocess chat"),
    *("generate", "chat", "serve", "export", "import", "info", "plan", "report", "doctor"),
)
"""Of nanollm; the README need not have them all."""


def commands() -> list[str]:
    """The commands of the code blocks in order, also those in a comment; lines that go on are joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    bare = [re.sub(r"^#\s+(?=nanollm [a-z]+ )", "", line).strip() for line in lines]
    return [shlex.join(shlex.split(line, comments=True)) for line in bare if line and not line.startswith("#")]


def rule_for(command: str) -> Rule | None:
    known = [*RULES, *(Rule(f"nanollm {words}") for words in AS_THEY_ARE)]
    fitting = [rule for rule in known if f"{command} ".startswith(f"{rule.begins} ")]
    return max(fitting, key=lambda rule: len(rule.begins), default=None)


def asked_of_nanollm() -> list[str]:
    """What stands behind `nanollm` in each command, those in the prose that have options included."""
    in_prose = re.findall(r"`(nanollm [a-z]+ [^`]*--[^`]*)`", README)
    found = [re.split(r"(?:^| )(?:\S*/)?nanollm ", command, maxsplit=1) for command in [*commands(), *in_prose]]
    return [words[1] for words in found if len(words) == 2]


def test_the_readme_has_no_command_without_a_rule_and_no_rule_is_left_over():
    found = commands()
    assert len(found) > 20
    assert [command for command in found if rule_for(command) is None] == []
    assert {rule.begins for rule in RULES} <= {rule_for(command).begins for command in found}
    for command in found:
        assert all(words in command for words in rule_for(command).instead)


@pytest.mark.parametrize("command", asked_of_nanollm())
def test_a_command_of_the_readme_is_understood_word_by_word(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb, *words = shlex.split(command)
    assert verb in cli.all_verbs()
    parse_options(verb, importlib.import_module(cli.module_of(verb)), words)


def test_what_the_readme_asks_of_make_and_pip_exists():
    offered = runpy.run_path(str(ROOT / "make.py"))["COMMANDS"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = re.findall(r"^(?:make|py make\.py) (\w+)", README, re.MULTILINE)
    wanted = re.findall(r"pip install -e \"\.\[(\w+)\]\"", README)
    assert len(asked) == 4
    assert len(wanted) >= 2
    assert set(asked) <= offered.keys()
    assert set(wanted) <= extras.keys()


@pytest.fixture
def fresh_folder(tmp_path, monkeypatch):
    """A folder as after a clone, as far as the commands see it, with text and conversations of the user's own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "my_texts").mkdir()
    texts = list(itertools.islice(builtin.documents(), 1500))
    for number, text in enumerate(texts):
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "mine.txt").write_text("\n\n".join(texts), encoding="utf-8")
    said = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
    (tmp_path / "my_chats.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_readme_followed_word_by_word_comes_to_its_end(fresh_folder):
    for command in commands():
        rule = rule_for(command)
        if rule.refused:
            continue
        for words, others in rule.instead.items():
            command = command.replace(words, others)
        program, *words = shlex.split(f"{command} {rule.more}")
        carry_out([sys.executable, *PROGRAMS[program], *words])
    for run in ("runs/mine", "runs/words-sft", "runs/words-grpo", "runs/nano-327m", "runs/several", "runs/demo/grpo"):
        assert (fresh_folder / run / "bundle" / "model.safetensors").is_file()
        assert (fresh_folder / run / "report.html").is_file()
    exported = {file.suffix for file in (fresh_folder / "runs/demo/grpo/export").rglob("*")}
    assert {".safetensors", ".gguf"} <= exported


def carry_out(command: list[str]) -> None:
    """Run it to its end; a conversation is one question, and a server ends when it has answered."""
    if "serve" in command:
        return serve(command)
    question = "Who are you?\n" if "chat" in command else ""
    done = subprocess.run(
        command, input=question, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-3000:]}"
    return None


def serve(command: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        assert wait_for(f"http://127.0.0.1:{port}/", server).startswith("<!doctype html>")
        assert json.loads(wait_for(f"http://127.0.0.1:{port}/v1/models", server))["object"] == "list"
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
    assert server.returncode == (1 if os.name == "nt" else 128 + signal.SIGTERM)


def wait_for(address: str, server: subprocess.Popen) -> str:
    """What stands there, as soon as the server answers."""
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return answer.read().decode()
        except OSError:
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < end, f"{address} does not answer"
            time.sleep(0.2)
