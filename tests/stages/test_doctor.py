"""What a user learns of their machine, and that the self-test sees what is broken."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from nanollm import progress
from nanollm.bundle import load_bundle, save_bundle
from nanollm.cli import main
from nanollm.generate import native
from nanollm.machine import Finding
from nanollm.model.cache import LatentCache
from nanollm.stages import doctor, tokenizer
from nanollm.text import words
from nanollm.train.checkpoint import checkpoints
from nanollm.world import World

FINDINGS = [
    Finding("python", "ok", "3.11.7"),
    Finding("hub", "warn", "it is [red]far[/red] away", "come nearer"),
    Finding("disk", "FAIL", "0.1 GB free", "make room"),
]
LINES = """\
ok    python      3.11.7
warn  hub         it is [red]far[/red] away
                  advice: come nearer
FAIL  disk        0.1 GB free
                  advice: make room
"""


@pytest.fixture
def found(monkeypatch):
    """found(findings): what the checks find."""
    return lambda findings: monkeypatch.setattr(doctor, "examine", lambda _: iter(findings))


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one, though this process may have compiled before."""
    for library in (words.library, native.library, native.can_draw):
        library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    yield
    native.can_draw.cache_clear()


# The whole


def test_every_check_runs_on_this_machine_and_nothing_is_left_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT_S", 300.0)  # other tests run beside it
    assert main(["doctor", "--offline", "--dir", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["ok"]
    names = [finding["name"] for finding in told["findings"] if finding["name"] not in ("gpu", "memory", "open files")]
    assert names == [
        *("python", "nanollm", "torch", "device", "threads", "packages", "compiler", "hub"),
        *("disk", "writing", "files", "clock", "self-test"),
    ]
    self_test = told["findings"][-1]["text"]
    assert "resumed to the same bits, bundle loaded as saved, reply with cache = one pass" in self_test
    before, after = map(float, re.search(r"s: loss ([\d.]+) to ([\d.]+),", self_test).groups())
    assert after < before - 2
    assert said.err == "self-test: a small run, at most about 300 s ...\n"
    assert list(tmp_path.iterdir()) == []


def test_each_finding_is_a_line_and_a_failure_is_exit_code_1(found, capsys):
    found(FINDINGS)
    with pytest.raises(SystemExit, match=r"^nanollm doctor: 1 of 3 checks failed: disk$"):  # which is exit code 1
        main(["doctor"])
    assert capsys.readouterr().out == LINES


def test_warnings_are_no_failures(found, capsys):
    found(FINDINGS[:2])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == LINES[: LINES.index("FAIL")]


def test_json_is_one_object(found, capsys):
    found(FINDINGS)
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told == {"ok": False, "findings": [dataclasses.asdict(finding) for finding in FINDINGS]}


def test_colours_are_for_terminals_that_want_them(found, capsys, monkeypatch):
    found(FINDINGS)
    colours = re.compile(r"\x1b\[[\d;]*3[123]m")

    def printed(**environment):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            for name, value in environment.items():
                patch.setenv(name, value)
            main(["doctor"])
        return capsys.readouterr().out

    assert not colours.search(printed())
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}  # as rich is told where it cannot see one
    assert len(colours.findall(printed(**terminal))) == 3
    assert not colours.search(printed(**terminal, NO_COLOR="1"))


def test_a_folder_that_is_none_is_the_users_mistake(tmp_path, capsys):
    assert main(["doctor", "--dir", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.endswith("nothing is not a folder; make it, or choose another --dir\n")


# Single checks


def test_a_check_that_breaks_is_a_finding():
    def break_down():
        raise RuntimeError("no\ndriver")

    assert doctor.attempt("gpu", break_down) == Finding(
        "gpu", "FAIL", "could not be checked: RuntimeError: no driver", doctor.REPORT
    )


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_is_not_asked_offline(monkeypatch, offline):
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0" if offline else "1")
    assert doctor.check_hub(offline) == Finding("hub", "ok", "not asked: this is to be offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert doctor.check_hub(False).text == "HF_ENDPOINT cannot be reached: HF_ENDPOINT must begin with https://"


def test_without_a_compiler_there_is_a_warning(no_compiler):
    finding = doctor.check_compiler()
    assert finding.level == "warn"
    assert finding.advice.startswith("no-such-compiler failed: ")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder where even root cannot write")
def test_a_folder_that_cannot_be_written_ends_the_checks_there(monkeypatch):
    assert [(finding.name, finding.level) for finding in doctor.check_folder(Path("/proc"))] == [("disk", "FAIL")]
    room = shutil.disk_usage(Path())._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    *_, last = doctor.check_folder(Path("/proc"))
    assert (last.name, last.level) == ("writing", "FAIL")
    assert last.text.startswith("/proc cannot be written: ")


# The self-test


def test_a_self_test_that_fails_names_the_step_and_what_to_send(monkeypatch, tmp_path, capsys):
    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor, "steps", lambda _: {"training": lambda: "loss 6 to 4", "the bundle": fail})
    finding = doctor.self_test(tmp_path)
    assert (finding.level, finding.text) == ("FAIL", "the bundle: OSError: [Errno 28] No space left on device")
    assert finding.advice == "add the output of nanollm doctor --json to your report"
    progress.say("heard again")
    assert capsys.readouterr().err.endswith("\nheard again\n")


def test_a_self_test_that_takes_too_long_says_what_it_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LIMIT_S", 0.0)
    monkeypatch.setattr(doctor, "steps", lambda _: {"training": lambda: "", "a reply": lambda: ""})
    finding = doctor.self_test(tmp_path)
    assert finding.level == "warn"
    assert finding.text.endswith("; not tried: training, a reply")
    assert "is the machine busy" in finding.advice


def test_an_interrupted_self_test_leaves_nothing(monkeypatch, tmp_path):
    def interrupt(_):
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(doctor.check_folder(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the first three steps make."""
    folder = tmp_path_factory.mktemp("self-test") / "room"
    steps = doctor.steps(folder)
    for name in ("the tokenizer", "the token files", "training"):
        steps[name]()
    return folder


@pytest.fixture
def room(made, tmp_path):
    """A copy of it, to break."""
    return Path(shutil.copytree(made, tmp_path / "room"))


def test_a_model_that_does_not_learn_is_seen(room):
    c = doctor.training_config(room)
    short, still = dataclasses.replace(c.train, steps=3), dataclasses.replace(c.optim, lr=1e-6)
    with pytest.raises(doctor.Wrong, match=r"the loss was 6\.\d\d in the first step and 6\.\d\d in step 3"):
        doctor.train(dataclasses.replace(c, out=room / "other", train=short, optim=still))


def test_a_run_that_goes_on_in_another_way_is_seen(room):
    c = doctor.training_config(room)
    with pytest.raises(doctor.Wrong, match="other weights than the one that was not stopped"):
        doctor.go_on(dataclasses.replace(c, optim=dataclasses.replace(c.optim, lr=2e-2)))


def test_a_bundle_with_other_weights_is_seen(room):
    bundle = load_bundle(room / "run" / "bundle")
    assert doctor.reopen(room / "run") == "bundle loaded as saved"
    weights = bundle.model.state_dict()
    weights["trunk.norm.weight"] = weights["trunk.norm.weight"].nextafter(torch.tensor(2.0))
    save_bundle(room / "run" / "bundle", bundle.model.config, weights, bundle.tokenizer, bundle.provenance)
    with pytest.raises(doctor.Wrong, match="other weights than the last checkpoint"):
        doctor.reopen(room / "run")


def test_a_cache_that_remembers_wrongly_is_seen(made, monkeypatch):
    write = LatentCache.write
    monkeypatch.setattr(
        LatentCache, "write", lambda self, block, entries, places: write(self, block, entries * 1.1, places)
    )
    with pytest.raises(
        doctor.Wrong, match=r"with the cache, log-probabilities differ by 0\.\d+ from those of one pass"
    ):
        doctor.reply(made / "run" / "bundle")


def test_a_compute_type_that_computes_something_else_is_seen(made, monkeypatch):
    def load_wrongly(folder, dtype, device):
        bundle = load_bundle(folder, dtype, device)
        if dtype == torch.bfloat16:
            bundle.model.trunk.norm.weight.data *= 2
        return bundle

    bundle, corpus = made / "run" / "bundle", made / "corpus.jsonl"
    monkeypatch.setattr(World, "start", lambda: World(dtype=torch.float32))
    assert doctor.round_off(bundle, corpus) == ""
    monkeypatch.setattr(World, "start", lambda: World(dtype=torch.bfloat16))
    assert doctor.round_off(bundle, corpus) == "bfloat16 = float32"
    monkeypatch.setattr(doctor, "load_bundle", load_wrongly)
    with pytest.raises(doctor.Wrong, match=r"the loss of a text is \d\.\d+ in bfloat16 and \d\.\d+ in float32"):
        doctor.round_off(bundle, corpus)


@pytest.mark.skipif(not native.can_draw(), reason="needs a compiler: apt-get install g++")
def test_compiled_code_that_answers_otherwise_is_seen(made, monkeypatch):
    bundle, corpus = made / "run" / "bundle", made / "corpus.jsonl"
    assert doctor.ask_compiled(bundle, corpus) == "compiled code = PyTorch"
    with monkeypatch.context() as patch:
        spell = words.NativeWords.spell
        patch.setattr(words.NativeWords, "spell", lambda self, texts: (spell(self, texts)[0][::-1], None))
        with pytest.raises(doctor.Wrong, match=r"words.cpp spells a text in another way"):
            doctor.ask_compiled(bundle, corpus)
    run = native.NativeRunner.run
    monkeypatch.setattr(
        native.NativeRunner,
        "run",
        lambda self, work: dataclasses.replace(run(self, work), logits=2 * run(self, work).logits),
    )
    with pytest.raises(
        doctor.Wrong, match=r"forward.cpp gives log-probabilities that differ by \d\.\d+ from PyTorch's"
    ):
        doctor.ask_compiled(bundle, corpus)


def test_without_a_compiler_the_self_test_leaves_compiled_code_out(made, no_compiler):
    assert doctor.ask_compiled(made / "run" / "bundle", made / "corpus.jsonl") == ""


def test_the_size_of_a_checkpoint_is_known_beforehand(made):
    newest = checkpoints(made / "run" / "checkpoints")[0]
    on_disk = sum(file.stat().st_size for file in newest.iterdir())
    assert doctor.checkpoint_bytes(doctor.training_config(made).model) == pytest.approx(on_disk, rel=0.05)
