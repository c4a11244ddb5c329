"""What is planned fits, adds up, and can be typed."""

import dataclasses
import importlib
import json
import shlex
from pathlib import Path

import pytest

from nanollm import cli, hardware
from nanollm.config import load_preset, parse_options, to_yaml
from nanollm.hardware import GPUS
from nanollm.model.config import ModelConfig
from nanollm.stages import plan
from nanollm.stages.plan import Config, Layout, command, good_batch_size, run

H200 = GPUS["h200"]


def planned(name: str | Path = "nano-327m", **settings):
    return json.loads(run(Config(model=str(name), json=True, **settings)))


def preset(name: str, **changes) -> ModelConfig:
    return ModelConfig(**(load_preset("model", name) | changes))


def refused(capsys, *words: str) -> str:
    """The one line that a mistake is answered with."""
    assert cli.main(["plan", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def pretrain_config(line: str):
    words = shlex.split(line)
    verb = words.index("pretrain")
    return parse_options("pretrain", importlib.import_module(cli.module_of("pretrain")), words[verb + 1 :])[0]


def test_a_plan_adds_up():
    facts = planned(tokens=9e9, gpu="h200", gpus=8, price=2.5)
    layout, timed = facts["layout"], facts["time"]
    assert layout["micro_batch_size"] * layout["micro_batches"] * 8 == layout["batch_size"] == 256
    assert facts["tokens"] == facts["steps"] * 256 * 2048
    assert 0 <= facts["tokens"] - 9e9 < 256 * 2048
    assert timed["hours"] == pytest.approx(facts["tokens"] / timed["tokens_per_s"] / 3600)
    assert facts["cost"] == pytest.approx(2.5 * 8 * timed["hours"])
    assert facts["memory_bytes"]["total"] <= (1 - plan.RESERVED["cuda"]) * facts["memory_bytes"]["of"]


def test_time_and_memory_are_those_measured_on_one_h200():
    layout = Layout(micro_batch_size=32, micro_batches=1, gpus=1, parallel="ddp", recompute=False)
    assert plan.time_facts(preset("nano-327m"), H200, layout, 1)["tokens_per_s"] == pytest.approx(188_800, rel=0.01)
    smaller = dataclasses.replace(layout, micro_batch_size=16)
    # 16 sequences beside two other copies of the weights and AdamW's state: 44.8 GB (docs/planning.md).
    beside = 2 * 2 * 327_007_232 + 4 * 327_007_232
    assert plan.memory_of(preset("nano-327m"), H200, smaller).total + beside == pytest.approx(44.8e9, rel=0.15)


@pytest.mark.parametrize(
    "settings",
    [{"gpu": "h200", "gpus": 8, "tokens": 9e9}, {"gpu": "t4", "batch_size": 12}, {"gpu": "8GB", "tokens": 1e6}],
)
def test_the_command_at_the_end_is_one_that_pretrain_takes_and_says_the_same(settings):
    facts = planned(**settings)
    typed, layout = pretrain_config(facts["command"]), facts["layout"]
    assert typed.model == preset("nano-327m")
    assert typed.train.steps == facts["steps"]
    assert typed.train.batch_size == layout["batch_size"]
    assert typed.train.micro_batch_size == layout["micro_batch_size"]
    assert typed.speed.recompute == layout["recompute"]
    assert typed.optim.name == "muon"
    assert typed.parallel == layout["parallel"]


def test_a_model_of_ones_own_is_planned_from_its_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(m := preset("nano-60m", context_length=2048)))
    facts = planned(file, gpu="h200", tokens=1e9)
    assert (facts["model"], facts["context_length"]) == (str(file), 2048)
    typed = pretrain_config(facts["command"])
    assert (typed.model, typed.out) == (m, Path("runs/mine"))


def test_one_gpu_is_started_plainly_a_host_by_torchrun_and_hosts_by_slurm():
    def start(gpus: int) -> str:
        layout = Layout(micro_batch_size=1, micro_batches=1, gpus=gpus, parallel="ddp", recompute=False)
        return command(Config(model="nano-20m"), preset("nano-20m"), layout, 1).partition(" --model")[0]

    assert start(1) == "nanollm pretrain"
    assert start(8) == "torchrun --standalone --nproc-per-node=8 -m nanollm pretrain"
    assert start(64) == "sbatch --nodes=8 recipes/pretrain.sbatch"


# --- what is chosen ---


def test_blocks_are_computed_again_only_where_nothing_else_fits():
    c = preset("nano-327m", context_length=8192)
    small, large = (plan.choose(c, dataclasses.replace(H200, memory=gb * 10**9), 8, 1) for gb in (10, 80))
    assert small is not None and small.recompute
    assert large is not None and not large.recompute


def test_the_model_is_divided_only_where_no_gpu_holds_it_alone():
    c = preset("nano-327m", n_blocks=200)  # 3 billion parameters
    assert plan.choose(c, GPUS["rtx4090"], 8, 1) is None
    together, hosts = plan.choose(c, GPUS["rtx4090"], 8, 8), plan.choose(c, GPUS["rtx4090"], 16, 16)
    assert together is not None and together.parallel == "fsdp"
    assert hosts is not None and hosts.parallel == "hsdp"
    alone = plan.choose(preset("nano-327m"), GPUS["rtx4090"], 8, 8)
    assert alone is not None and alone.parallel == "ddp"


def test_the_step_to_begin_with_follows_the_tokens():
    assert good_batch_size(preset("nano-327m"), 9e9) * 2048 == 524_288
    assert good_batch_size(preset("nano-327m"), 9e9, gpus=8) == 256
    assert good_batch_size(preset("nano-20m"), 7e6) == 8
    assert good_batch_size(preset("nano-1m"), 1) == 1


def test_without_a_number_of_tokens_there_are_20_for_each_parameter():
    assert planned("nano-1m", gpu="t4")["tokens"] == pytest.approx(20 * 1_206_016, rel=1e-3)


# --- for people ---


def test_a_gpu_of_which_only_the_memory_is_known_is_told_what_fits_and_hours_with_its_rate_only():
    facts = planned("nano-60m", gpu="8GB", price=1)
    assert facts["memory_bytes"]["total"] < 8e9
    assert facts["time"] is None and facts["cost"] is None
    assert "say how fast it is, such as --tflops 40" in run(Config(model="nano-60m", gpu="8GB"))
    assert planned("nano-60m", gpu="8GB", tflops=40)["time"]["hours"] > 0


def test_the_table_names_its_source_and_a_command_with_no_folder_of_another_model():
    text = run(Config(model="nano-5m", gpu="h200", price=2))
    assert "h200: 141.0 GB, 989.4 TFLOP/s" in text
    assert "38% of the peak, as measured with nano-327m on one H200; not counted: validation, saving\n" in text
    assert text.splitlines()[-1].startswith("nanollm pretrain --model nano-5m --tokenizer_path TOKENIZER --data TOKENS")


# --- this machine ---


def test_a_cpu_is_measured_and_planned_for_by_its_own_memory():
    facts = planned("nano-1m", cpu=True, tokens=1e6)
    known = hardware.memory()
    assert facts["memory_bytes"]["of"] == (known and known[1])
    assert facts["hardware"]["is_measured"] and facts["hardware"]["tflops"] > 0
    assert facts["time"]["mfu_measured_with"] == "nano-1m on two CPU cores"


# --- mistakes ---


def test_an_unknown_gpu_is_answered_with_those_that_are_known(capsys):
    said = refused(capsys, "nano-1m", "--gpu", "a100")
    assert "unknown GPU a100; known are t4, " in said and "b200; of another give the memory: --gpu 24GB" in said


def test_where_nothing_fits_the_least_that_would_is_said(capsys):
    said = refused(capsys, "nano-327m", "--gpu", "2GB")
    assert "nano-327m does not fit into 2.0 GB: its smallest step takes 6." in said
    assert "; t4 has that" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "0"], "tokens must be a number above 0, got 0"),
        (["--gpu", "h100", "--gpus", "12"], "gpus must be from 1 to 8, or a multiple of 8 (hosts of 8), got 12"),
        (["--gpu", "h100", "--cpu"], "leave out gpu, gpus and tflops, or leave out cpu"),
        (["--gpu", "8GB", "--tflops", "-1"], "tflops must be a number above 0, got -1"),
        (["--gpu", "h100", "--gpus", "8", "--batch_size", "12"], "batch_size must be a multiple of gpus (8), got 12"),
    ],
)
def test_mistakes_are_told_in_one_line(words, said, capsys):
    assert said in refused(capsys, "nano-1m", *words)
