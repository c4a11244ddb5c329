"""What a user learns of their machine, and that the small run sees what is broken."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from nanollm import hardware
from nanollm.cli import main
from nanollm.generate import cpu_runner as native
from nanollm.hardware import GB
from nanollm.model.cache import LatentCache
from nanollm.stages import doctor
from nanollm.stages.doctor import Finding
from nanollm.text import words

FINDINGS = [
    Finding("versions", "ok", "3.11.7"),
    Finding("memory", "warn", "it is [red]far[/red] away", "come nearer"),
    Finding("disk", "FAIL", "0.1 GB free", "make room"),
]
LINES = """\
ok    versions    3.11.7
warn  memory      it is [red]far[/red] away
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


@pytest.mark.long
def test_every_check_runs_on_this_machine_and_nothing_is_left_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "USUAL_S", 300.0)  # other tests run beside it
    assert main(["doctor", "--dir", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["ok"]
    names = [finding["name"] for finding in told["findings"]]
    assert names == ["versions", "torch", "device", "cores", "memory", "compiler", "disk", "small run"]
    small_run = told["findings"][-1]["text"]
    assert "resumed to the same bits, reply (torch) = one pass" in small_run
    before, after = map(float, re.search(r"s: loss ([\d.]+) to ([\d.]+),", small_run).groups())
    assert after < before - 2
    assert said.err == "small run: about 300 s ...\n"
    assert list(tmp_path.iterdir()) == []


def test_each_finding_is_a_line_and_a_failure_is_exit_code_1(found, capsys):
    found(FINDINGS)
    with pytest.raises(SystemExit, match=r"^nanollm doctor: 1 of 3 checks failed: disk$"):  # which is exit code 1
        main(["doctor"])
    assert capsys.readouterr().out == LINES


def test_a_folder_that_is_none_is_the_users_mistake(tmp_path, capsys):
    assert main(["doctor", "--dir", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.endswith("nothing is not a folder; make it, or choose another --dir\n")


def test_a_check_that_breaks_is_a_failure_and_the_others_still_run(monkeypatch, tmp_path):
    def break_down(*_):
        raise RuntimeError("no\ndriver")

    monkeypatch.setattr(doctor, "check_device", break_down)
    monkeypatch.setattr(doctor, "small_run", break_down)
    findings = list(doctor.examine(doctor.Config(dir=tmp_path)))
    assert findings[2] == Finding("device", "FAIL", "RuntimeError: no driver", doctor.REPORT)
    assert len(findings) == 8


# Single checks


@pytest.mark.parametrize(
    ("threads", "cores", "load", "text", "advice"),
    [
        (2, 2, 0.5, "threads: 2, cores: 2, load: 0.5", ""),
        (64, 2, 0.0, "threads: 64, cores: 2, load: 0.0", "set OMP_NUM_THREADS=2"),
        (1, 8, 0.0, "threads: 1, cores: 8, load: 0.0", "set OMP_NUM_THREADS=8"),
        (2, 2, 2.9, "threads: 2, cores: 2, load: 2.9", "other programs are at work"),
    ],
)
def test_threads_that_do_not_fit_and_a_shared_machine_are_named(monkeypatch, threads, cores, load, text, advice):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(hardware, "usable_cores", lambda: cores)
    monkeypatch.setattr(hardware, "load", lambda: load)
    said, advised = doctor.check_cores()
    assert (said, bool(advised)) == (text, bool(advice))
    assert advised.startswith(advice)


def test_a_disk_that_is_nearly_full_is_named_with_what_a_run_takes():
    assert doctor.check_disk(int(10 * GB)) == ("10.0 GB free; checkpoints of nano-327m take 8.8 GB", "")
    assert doctor.check_disk(int(1 * GB))[1].startswith("make room")
    with pytest.raises(OSError, match=r"0\.2 GB free; .*: make room"):
        doctor.check_disk(int(0.25 * GB))


def test_a_type_that_is_slower_than_float32_is_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(hardware, "measure_gemm", lambda _, dtype: 1.0 if dtype == torch.float32 else 0.5)
    monkeypatch.setattr(doctor.World, "start", lambda: doctor.World(dtype=torch.bfloat16))
    said, advice = doctor.check_device()
    assert said.startswith("cpu in bfloat16; float32 1 TFLOP/s, bfloat16 0.5 TFLOP/s")
    assert advice.startswith("take --dtype float32")


def test_without_a_compiler_there_is_a_warning(no_compiler):
    said, advice = doctor.check_compiler()
    assert "several times slower" in said
    assert advice.startswith("no-such-compiler failed: ")


# The small run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the small run has trained."""
    folder = tmp_path_factory.mktemp("small-run")
    c = doctor.training_config(folder)
    doctor.prepare(c)
    doctor.train(c)
    return folder


@pytest.mark.long
def test_a_model_that_does_not_learn_is_seen(made, tmp_path):
    c = doctor.training_config(made)
    short, still = dataclasses.replace(c.train, steps=3), dataclasses.replace(c.optim, lr=1e-6)
    with pytest.raises(ArithmeticError, match=r"the loss was 6\.\d\d in step 1 and 6\.\d\d in step 3"):
        doctor.train(dataclasses.replace(c, out=tmp_path / "other", train=short, optim=still))


@pytest.mark.long
def test_a_run_that_is_resumed_in_another_way_is_seen(made, tmp_path):
    c = doctor.training_config(Path(shutil.copytree(made, tmp_path / "room")))
    with pytest.raises(ArithmeticError, match="other weights than one that was not stopped"):
        doctor.resume(dataclasses.replace(c, optim=dataclasses.replace(c.optim, lr=2e-2)))


@pytest.mark.long
def test_a_cache_that_remembers_wrongly_is_seen(made, monkeypatch):
    write = LatentCache.write
    monkeypatch.setattr(
        LatentCache, "write", lambda self, block, entries, places: write(self, block, entries * 1.1, places)
    )
    with pytest.raises(ArithmeticError, match=r"a reply \(torch\) has log-probabilities 0\.\d+ away from"):
        doctor.reply(made / "run" / "bundle", "torch")


@pytest.mark.long
@pytest.mark.skipif(not native.can_draw(), reason="needs a compiler: apt-get install g++")
def test_compiled_code_that_answers_otherwise_is_seen(made, monkeypatch):
    assert doctor.reply(made / "run" / "bundle", "native") == "reply (native) = one pass"
    run = native.NativeRunner.run
    monkeypatch.setattr(
        native.NativeRunner,
        "run",
        lambda self, work: dataclasses.replace(run(self, work), logits=2 * run(self, work).logits),
    )
    with pytest.raises(ArithmeticError, match=r"a reply \(native\) has log-probabilities \d\.\d+ away from"):
        doctor.reply(made / "run" / "bundle", "native")
