"""What is planned fits, adds up, and can be typed."""

import importlib
import json
import shlex

import pytest

from nanollm import cli, machine, options
from nanollm.model.config import ModelConfig
from nanollm.settings import load_preset
from nanollm.stages.plan import Config, command, duration, machine_of, model_words, run
from nanollm.train.forecast import Layout
from nanollm.train.machines import GPUS, RESERVED


def planned(name="nano-327m", **settings):
    return json.loads(run(Config(model=preset(name), json=True, **settings)))


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
    return options.read("pretrain", importlib.import_module(cli.module_of("pretrain")), words[verb + 1 :])[0]


def test_a_plan_adds_up():
    facts = planned(tokens=9e9, gpu="h200", gpus=8, price=2.5, currency="EUR")
    layout, timed = facts["layout"], facts["time"]
    assert layout["sequences"] * layout["micro_batches"] * 8 == layout["batch_size"] == 256
    assert facts["tokens"] == facts["steps"] * 256 * 2048
    assert 0 <= facts["tokens"] - 9e9 < 256 * 2048
    assert timed["hours"] == pytest.approx(facts["tokens"] / timed["tokens_per_s"] / 3600)
    assert facts["cost"]["amount"] == pytest.approx(2.5 * 8 * timed["hours"])
    memory = facts["memory_bytes"]
    assert memory["total"] <= (1 - RESERVED["cuda"]) * memory["of"]


@pytest.mark.parametrize(
    "settings",
    [
        {"gpu": "h200", "gpus": 8, "tokens": 9e9},
        {"gpu": "t4", "batch_size": 12, "optimizer": "adamw"},
        {"gpu": "8GB", "tokens": 1e6},
    ],
)
def test_the_command_at_the_end_is_one_that_pretrain_takes_and_says_the_same(settings):
    facts = planned(**settings)
    typed, layout = pretrain_config(facts["command"]), facts["layout"]
    assert typed.model == preset("nano-327m")
    assert typed.train.steps == facts["steps"]
    assert typed.train.batch_size == layout["batch_size"]
    assert typed.train.micro_batch_size == layout["sequences"]
    assert typed.speed.recompute == layout["recompute"]
    assert typed.optim.name == layout["optimizer"]
    assert typed.parallel == layout["parallel"]


def test_a_model_of_ones_own_is_typed_as_the_preset_that_is_most_like_it_and_what_differs():
    m = preset("nano-60m", context_length=2048, norm_topk_prob=True, experts_per_token=2)
    words = model_words(m)
    assert words[:2] == ["--model", "nano-60m"]
    assert set(words[2::2]) == {"--model.context_length", "--model.norm_topk_prob", "--model.experts_per_token"}
    line = f"pretrain {shlex.join(words)} --tokenizer_path t --data d --out o --train.steps 1"
    assert pretrain_config(line).model == m


def test_one_gpu_is_started_plainly_a_host_by_torchrun_and_hosts_by_slurm():
    c = Config(model=preset("nano-20m"))

    def start(processes: int) -> str:
        layout = Layout(sequences=1, micro_batches=1, processes=processes, parallel="ddp")
        return command(c, GPUS["h100"], layout, 1, ["--model", "nano-20m"]).partition(" --model")[0]

    assert start(1) == "nanollm pretrain"
    assert start(8) == "torchrun --standalone --nproc-per-node=8 -m nanollm pretrain"
    assert start(64) == "sbatch --nodes=8 recipes/pretrain.sbatch"


def test_a_gpu_of_which_only_the_memory_is_known_is_told_what_fits_and_hours_with_its_rate_only():
    facts = planned("nano-60m", gpu="8GB", price=1)
    assert facts["memory_bytes"]["total"] < 8e9
    assert facts["time"] is None and facts["cost"] is None
    assert "say how fast it is, such as --tflops 40" in run(Config(model=preset("nano-60m"), gpu="8GB"))
    assert planned("nano-60m", gpu="8GB", tflops=40)["time"]["hours"] > 0


def test_a_plan_says_where_its_rates_come_from():
    given = run(Config(model=preset("nano-60m"), gpu="8GB", tflops=40))
    assert "% of what was given;" in given and "data sheet;" not in given and "measured just now" not in given
    assert "% of its data sheet;" in run(Config(model=preset("nano-60m"), gpu="h100"))
    assert "CUDA's own, assumed 600.0 MB" in given


def test_memory_that_is_given_takes_the_place_of_what_is_known():
    whole, half = (planned(gpu="h100", memory=memory)["memory_bytes"] for memory in (None, "40GB"))
    assert (whole["of"], half["of"]) == (80_000_000_000, 40_000_000_000)
    assert half["total"] < 40e9 < whole["total"]


def test_the_cache_that_is_served_from_fills_what_the_weights_leave():
    fits = planned(gpu="h200")["serving"]["fits"]
    assert fits.keys() == {"bfloat16"}  # int8 is for CPUs
    assert fits["bfloat16"]["weight_bytes"] == 2 * 327_007_232
    assert fits["bfloat16"]["conversations"] == fits["bfloat16"]["tokens"] // 2048


def test_without_a_number_of_tokens_there_are_20_for_each_parameter():
    facts = planned("nano-1m", gpu="t4")
    assert facts["tokens"] == pytest.approx(20 * 1_206_016, rel=1e-3)


def test_the_table_is_for_people():
    text = run(Config(model=preset("nano-327m"), tokens=9e9, gpu="h200", price=2, currency="EUR"))
    assert "nano-327m: 327,007,232 parameters, 264,781,568 active per token" in text
    assert "h200: 141.0 GB, 989.4 TFLOP/s, 4,800 GB/s" in text
    assert "on one H200" in text and "assumed for any other GPU" in text
    assert " EUR (" in text
    assert text.splitlines()[-1].startswith("nanollm pretrain --model nano-327m")


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0.01, "36 seconds"), (0.5, "30 minutes"), (5, "5.0 hours"), (72, "72.0 hours (3.0 days)")],
)
def test_time_is_said_in_the_unit_people_use(hours, said):
    assert duration(hours) == said


# --- this machine ---


def test_a_cpu_is_measured_and_planned_for_by_its_own_memory():
    c = Config(model=preset("nano-1m"), cpu=True, tokens=1e6)
    here = machine_of(c)
    known = machine.memory()
    assert known is None or here.memory == known[1]
    assert here.kind == "cpu" and here.tflops and here.gb_per_s
    facts = planned("nano-1m", cpu=True, tokens=1e6, memory="4GB")
    assert facts["machine"]["rates"] == "measured"
    assert facts["memory_bytes"]["of"] == 4_000_000_000
    assert facts["serving"]["fits"].keys() >= {"int8"}
    assert facts["time"]["hours"] > 0


# --- mistakes ---


def test_an_unknown_gpu_is_answered_with_those_that_are_known(capsys):
    said = refused(capsys, "nano-1m", "--gpu", "h300")
    assert "unknown GPU h300; known are t4, " in said and "b200; of another give the memory: --gpu 24GB" in said


def test_where_nothing_fits_the_least_that_would_is_said(capsys):
    said = refused(capsys, "nano-327m", "--gpu", "2GB")
    assert "nano-327m with muon does not fit into 2.0 GB: its smallest step wants a machine of 6." in said
    assert " GB, which t4 has; nano-60m is the largest preset that fits" in said


def test_a_step_that_no_known_gpu_holds_is_said_to_be_so(capsys):
    said = refused(capsys, "nano-327m", "--model.n_blocks", "4000", "--gpu", "b200")
    assert ", which no GPU has that is known; nano-327m-fine is the largest preset that fits" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "0"], "tokens must be from 1 to 1e+16, got 0"),
        (["--gpu", "h100", "--gpus", "0"], "gpus must be from 1 to 65,536, got 0"),
        (["--gpu", "h100", "--gpus", "12"], "gpus above 8 must be a multiple of 8 (hosts of 8), got 12"),
        (["--gpu", "h100", "--cpu"], "leave out gpu, gpus and tflops, or leave out cpu"),
        (["--gpu", "h100", "--price", "-1"], "price must be a number above 0, got -1"),
        (["--gpu", "8GB", "--tflops", "0"], "tflops must be a number above 0, got 0"),
        (["--gpu", "8TB"], "gpu: expected gigabytes such as 24GB, got 8TB"),
        (["--gpu", "h100", "--memory", "much"], "memory: expected gigabytes such as 24GB, got much"),
        (["--gpu", "h100", "--gpus", "8", "--batch_size", "12"], "batch_size must be a multiple of gpus (8), at most"),
        (["--gpu", "h100", "--batch_size", "0"], "multiple of gpus (1), at most 1,000,000,000, got 0"),
        (["--gpu", "h100", "--tokens", "1e15", "--batch_size", "1"], "1e+15 tokens are 3,906,250,000,000 steps of"),
    ],
)
def test_mistakes_are_told_in_one_line(words, said, capsys):
    assert said in refused(capsys, "nano-1m", *words)
