"""The benchmarks compare what they say, and a record holds what someone needs to believe it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, measuring, moe, run, train_step
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY


@pytest.fixture
def ours(monkeypatch):
    """A benchmark that takes no time, in which b is twice as fast as a."""

    def measure(options):
        print("a peer speaks")
        return {"unit": "tokens/s", **measuring.in_turns({"a": lambda: 10.0, "b": lambda: 20.0}, options.repeats)}

    fake = SimpleNamespace(add_options=lambda p: p.add_argument("--size", default="small"), measure=measure)
    monkeypatch.setattr(run, "all_benchmarks", lambda: {"ours": "Which is faster?"})
    monkeypatch.setattr(run, "module_of", lambda name: fake)
    return fake


def test_sides_are_measured_in_turns_and_compared_within_a_turn_after_a_forgotten_warm_up():
    order, speeds = [], iter([100.0, 100.0, *map(float, range(1, 100))])

    def side(name):
        def measure():
            order.append(name)
            return next(speeds)

        return measure

    facts = measuring.in_turns({"a": side("a"), "b": side("b")}, 3, roof={"gemm": side("gemm")}, warm_up=True)
    assert order == ["a", "b", *(["a", "b", "gemm"] * 3)]
    assert facts["sides"]["a"] == {"median": 4.0, "least": 1.0, "greatest": 7.0, "n": 3, "values": [1.0, 4.0, 7.0]}
    assert facts["ratio"].keys() == {"b"}
    assert facts["ratio"]["b"]["values"] == [2.0, 5 / 4, 8 / 7]  # not the ratio of the medians
    assert facts["roof"]["gemm"]["values"] == [3.0, 6.0, 9.0]


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--repeats must be at least 1, got 0"):
        measuring.in_turns({"a": lambda: 1.0}, repeats=0)
    with pytest.raises(ValueError, match="different names, got a, a"):
        measuring.in_turns({"a": lambda: 1.0}, repeats=1, roof={"a": lambda: 1.0})
    with pytest.raises(ValueError, match="a\\.txt is not there; point --data at"):
        measuring.data_folder(SimpleNamespace(data=tmp_path), "a.txt")


def test_the_roof_is_measured_in_the_shapes_of_the_model():
    shapes = {(out, width) for _, width, out in measuring.model_shapes(TINY, 8)}
    dense, sparse = Transformer(TINY).trunk.blocks[:2]
    assert {p.shape for p in dense.parameters() if p.dim() == 2} <= shapes
    assert {p.shape for p in sparse.ffn.shared.parameters()} <= shapes
    assert measuring.matmul_roof([(64, 32, 16), (8, 8, 8)], torch.float32) > 0


def test_peak_memory_is_what_this_process_held():
    words = "from benchmarks.measuring import *; b = bytearray(3 * 10**8); del b; print(memory_gb(), peak_memory_gb())"
    done = subprocess.run([sys.executable, "-c", words], cwd=run.ROOT, capture_output=True, text=True, check=True)
    now, peak = map(float, done.stdout.split())
    assert now < 0.2  # not that of this process, which has loaded torch
    assert 0.3 < peak < 0.5


def test_both_feed_forward_networks_meet_the_same_weights_but_for_the_router():
    world = SimpleNamespace(device="cpu", dtype=torch.float32)
    width = TINY.d_expert * (TINY.n_shared_experts + TINY.experts_per_token)
    dense, sparse = moe.one_block(TINY, 16, world, dense_width=width), moe.one_block(TINY, 16, world)
    router = TINY.n_routed_experts * TINY.d_model
    assert moe.weights_met(sparse, TINY) - moe.weights_met(dense, TINY) == router


def test_a_record_says_when_where_and_with_what_it_was_measured(ours, tmp_path, capsys):
    assert run.main(["ours", "--repeats", "2", "--size", "large"], tmp_path) == 0
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"{record['date']}_{path.name.split('_')[1]}_ours_size-large.json"
    assert record["commit"] != "unknown"
    assert record["versions"]["torch"].startswith("2.")
    assert record["hardware"]["cores"] > 0
    assert record["ratio"]["b"]["values"] == [2.0, 2.0]
    out = capsys.readouterr().out
    assert "20 (20 to 20) tokens/s   2 (2 to 2) x" in out
    assert "a peer speaks" not in out


def test_json_is_all_that_is_printed(ours, tmp_path, capsys):
    assert run.main(["ours", "--json", "--no_save"], tmp_path) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "ours"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(run.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_record_names_its_benchmark_commit_and_hardware_and_is_written_in_few_lines(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["commit"] and record["hardware"] and record["benchmark"] in path.stem
    assert path.read_text(encoding="utf-8") == run.to_json(record) + "\n"


def test_compare_shows_the_change_against_the_newest_record_of_the_same_hardware_and_options(ours, tmp_path, capsys):
    run.main(["ours"], tmp_path)
    (now,) = tmp_path.iterdir()
    record = json.loads(now.read_text(encoding="utf-8"))
    for day, change, speeds in (("1", {}, [5.0]), ("2", {}, [5.0, 10.0, 20.0]), ("3", {"processor": "x"}, [80.0])):
        old = record | {"sides": {"b": measuring.spread_of(speeds)}, "ratio": {}, "commit": f"c{day}"}
        old["hardware"] = record["hardware"] | change
        (tmp_path / f"2020-01-0{day}_x_ours.json").write_text(json.dumps(old), encoding="utf-8")
    now.unlink()
    capsys.readouterr()
    run.main(["ours", "--compare", "--json"], tmp_path)
    compared = json.loads(capsys.readouterr().out)["compared"]
    assert (compared["file"], compared["commit"]) == ("2020-01-02_x_ours.json", "c2")
    change = compared["changes"]["sides / b"]
    assert (change["change"], change["least"], change["greatest"]) == (2.0, 1.0, 4.0)  # no surer than both spreads
    assert run.main(["ours", "--size", "large", "--compare"], tmp_path) == 0
    assert "no earlier record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "unknown benchmark nonsense; they are ours"),
        (["ours", "--speed", "3"], "ours: no option takes --speed"),
    ],
)
def test_unknown_words_are_told_in_one_line(ours, tmp_path, words, said, capsys):
    assert run.main(words, tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_one_that_cannot_be_measured_does_not_hide_the_others(ours, monkeypatch, tmp_path, capsys):
    def fails(options):
        raise ValueError("this benchmark needs real text")

    broken = SimpleNamespace(measure=fails)
    monkeypatch.setattr(run, "all_benchmarks", lambda: {"broken": "?", "ours": "?"})
    monkeypatch.setattr(run, "module_of", lambda name: broken if name == "broken" else ours)
    assert run.main([], tmp_path) == 1  # no name: all of them
    assert "broken: this benchmark needs real text" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", run.all_benchmarks())
def test_every_benchmark_says_what_it_measures_and_explains_its_options(name, capsys):
    assert run.all_benchmarks()[name]
    with pytest.raises(SystemExit, match="0"):
        run.main([name, "--help"])
    assert "--repeats" in capsys.readouterr().out


def test_the_sides_of_a_training_step_compute_the_same():
    turns = {side: train_step.one_turn(side, "nano-1m", 2, 32) for side in train_step.SIDES}
    for name in ("first_loss", "loss"):
        losses = [turn[name] for turn in turns.values()]
        assert max(losses) - min(losses) < train_step.TOLERANCE
    assert all(turn["loss"] != turn["first_loss"] and turn["seconds"] > 0 for turn in turns.values())


def test_a_side_that_the_system_ended_is_told(monkeypatch):
    ended = subprocess.CompletedProcess([], -9, "", "some trace")
    monkeypatch.setattr(train_step.subprocess, "run", lambda *args, **kwargs: ended)
    with pytest.raises(ValueError, match=r"nanollm ended with status -9 .*: some trace"):
        train_step.in_a_process("nanollm", SimpleNamespace(preset="nano-1m", rows=1, context=8, compile="auto"))


@pytest.mark.filterwarnings("default")  # of torch's own compiler
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.long] if part == "fused" else []) for part in gpu.PARTS]
)
def test_every_part_of_the_day_with_a_gpu_runs_on_a_cpu(part):
    facts = dict(gpu.PARTS[part][0](gpu.TINY))
    assert facts
    if part == "correctness":
        assert {*facts["graph and eager"]["replies of the same ids"].values()} == {4}
        assert facts["engine to whole pass, nats"]["greatest"] < 0.2


def test_what_a_part_has_measured_is_kept_though_it_fails_or_is_stopped(tmp_path, monkeypatch):
    options = SimpleNamespace(minutes=1.0, tiny=True, parts=["serving", "decode"], out=tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "PARTS", {"serving": (None, 1e3), "decode": (None, 1)})  # which has no time to begin
    facts = gpu.measure(options)
    assert facts["serving"]["3 streams"]["tokens_per_s"] > 0
    assert facts["decode"]["failure"] == "stopped after 0 s"
    assert json.loads(options.out.read_text()) == facts
    options.parts = ["unknown"]
    monkeypatch.setattr(gpu, "PARTS", {"unknown": (None, 1)})
    assert "KeyError: 'unknown'" in gpu.measure(options)["unknown"]["failure"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
