"""Runs that train an adapter: what they leave, how they resume, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from nanollm import cli
from nanollm.bundle import load_bundle
from nanollm.generate.engine import Engine, generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.lora import LoraConfig, pairs_of
from nanollm.rl import grpo as grpo_step
from nanollm.rl.loss import ObjectiveConfig
from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.tasks import TaskConfig
from nanollm.stages import grpo, merge, sft
from nanollm.train import state as train_state
from nanollm.train.checkpoint import checkpoints
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from tests.stages.conftest import FILES_OF_A_RUN, interrupted, told, untrained, weights_of
from tests.stages.test_sft import SHAPE, bundle, folders, run_config

__all__ = ["bundle", "folders", "run_config"]

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def grpo_config(bundle, tmp_path):
    def make(out="grpo", steps=4, **changes):
        settings = {
            "bundle": bundle,
            "out": tmp_path / out,
            "task": TaskConfig(name="tests.faults.even:Even"),
            "train": grpo.GrpoTrainConfig(steps=steps, validate_every=2, save_every=2),
            "rollout": RolloutConfig(prompts=3, group_size=4, max_tokens=10),
            "optim": OptimConfig(name="adamw", lr=1e-2, warmup_steps=1, balance_rate=0.0),
            "objective": ObjectiveConfig(beta=0.1),
            "validation_problems": 5,
            "dtype": "float32",
            "lora": LORA,
        }
        return grpo.Config(**settings | changes)

    return make


def test_a_run_leaves_an_adapter_and_its_merged_bundle(run_config, bundle, tmp_path):
    c = run_config(lora=LORA)
    made = sft.run(c)
    assert {path.name for path in c.out.iterdir()} == FILES_OF_A_RUN | {"adapter"}
    lines = read_metrics(c.out)
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    adapter, base = load_file(c.out / "adapter" / "adapter.safetensors"), load_bundle(bundle)
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    facts = json.loads((c.out / "adapter" / "adapter.json").read_text())
    known = {"rank": 4, "alpha": 8.0, "targets": LORA.targets, "base": base.provenance["files"]["model.safetensors"]}
    assert facts.items() >= known.items()
    merged, before = load_bundle(made).model.state_dict(), base.model.state_dict()
    for name, tensor in before.items():  # what has no adapter, the routers' bias too, is the base's to the bit
        assert torch.equal(merged[name], tensor) == (f"{name}.lora_A" not in adapter)
    beside = Engine(base.model, rows=20, adapters={"own": pairs_of(base.model, adapter, LORA.scale)})
    replies = [beside.submit(dataclasses.replace(reply.request, adapter="own")) for reply in replies_of(base.model)]
    while beside.has_work:
        beside.step()
    assert [reply.ids for reply in replies] == greedy(load_bundle(made).model)
    saved = load_file(checkpoints(c.out / "checkpoints")[0] / "weights.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(tensor.numel() for tensor in adapter.values())
    again = tmp_path / "merged"
    assert cli.main(["merge", *map(str, ("--bundle", bundle, "--adapter", c.out / "adapter", "--out", again))]) == 0
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in made.iterdir())


def replies_of(model):
    prompts = [[1, number, number + 1] for number in range(5, 25)]
    return generate(model, prompts, SamplingConfig(temperature=0), max_tokens=16, stop_token_ids=())


def greedy(model):
    return [reply.ids for reply in replies_of(model)]


def the_bundle_says_what_was_trained(run_config, monkeypatch) -> None:
    states = []
    real = sft.TrainState.start
    with monkeypatch.context() as patch:
        patch.setattr(
            sft.TrainState, "start", lambda *given, **named: states.append(real(*given, **named)) or states[-1]
        )
        made = load_bundle(sft.run(run_config(lora=LORA))).model
    (state,), tokens = states, torch.arange(5, 45)[None]
    with torch.no_grad(), state.model.evaluating():
        torch.testing.assert_close(made(tokens), state.model(tokens), atol=1e-5, rtol=0)
    assert greedy(made) == greedy(state.whole_model())


def test_the_bundle_says_what_was_trained(run_config, monkeypatch):
    the_bundle_says_what_was_trained(run_config, monkeypatch)


def test_bug_the_base_saved_instead_of_the_sum(run_config, monkeypatch):
    """unslothai/unsloth-zoo#812."""
    monkeypatch.setattr(
        "nanollm.bundle.merged", lambda weights, scale: {n: w for n, w in weights.items() if "lora_" not in n}
    )
    with pytest.raises(AssertionError):
        the_bundle_says_what_was_trained(run_config, monkeypatch)


def killed_at_a_step_it_ends_with_the_same_bits(run_config, monkeypatch) -> None:
    expected, killed = (run_config(steps=8, out=out, lora=LORA) for out in ("expected", "killed"))
    sft.run(expected)
    with interrupted(monkeypatch, sft, "train_step", after=5):
        sft.run(killed)
    sft.run(killed)
    assert weights_of(killed.out) == weights_of(expected.out)
    assert told(killed.out) == told(expected.out)


def test_killed_at_a_step_it_ends_with_the_same_bits(run_config, monkeypatch):
    killed_at_a_step_it_ends_with_the_same_bits(run_config, monkeypatch)


def test_bfloat16_keeps_the_float32_base_in_the_bundle(run_config, bundle):
    made = load_bundle(sft.run(run_config(steps=2, lora=LoraConfig(rank=4, targets=["o_proj"]), dtype="bfloat16")))
    before = load_bundle(bundle).model.state_dict()
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.endswith("o_proj.weight"))


def test_a_run_is_not_continued_with_another_adapter_or_base(run_config, tokenizer, tmp_path):
    c = run_config(steps=2, lora=LORA)
    sft.run(c)
    other = untrained(tmp_path / "other", SHAPE, tokenizer, seed=1)
    for change, said in [
        ({"lora": dataclasses.replace(LORA, alpha=9.0)}, r"lora\.alpha = 8\.0, this run has 9\.0"),
        ({"lora": LoraConfig()}, r"was begun with lora\."),
        ({"bundle": other}, r"inputs\.bundle = "),
    ]:
        with pytest.raises(ValueError, match=said):
            sft.run(dataclasses.replace(c, **change))
    with pytest.raises(ValueError, match=r"was trained on weights \w{6}, this bundle has \w{6}; give the bundle"):
        merge.run(merge.Config(bundle=other, adapter=c.out / "adapter", out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_was_changed_or_is_none_is_refused(run_config, bundle, tmp_path):
    sft.run(c := run_config(steps=1, lora=LORA))
    config = merge.Config(bundle=bundle, adapter=c.out / "adapter", out=tmp_path / "merged")
    shutil.copytree(config.adapter, tmp_path / "changed")
    file = tmp_path / "changed" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    for adapter, said in [
        (tmp_path / "changed", "was changed after it was written"),
        (bundle, "holds no adapter.json"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            merge.run(dataclasses.replace(config, adapter=adapter))
    with pytest.raises(ValueError, match=r"contains .*; choose another --out"):
        merge.run(dataclasses.replace(config, out=bundle.parent))


def test_a_target_that_is_not_there_is_refused_before_anything_is_made(run_config, capsys):
    c = run_config(lora=LoraConfig(rank=4, targets=["q_proj"]))
    for start in (sft.plan, sft.run):
        with pytest.raises(ValueError, match="no matrix of this model is called q_proj; it has centroids, down_proj"):
            start(c)
    assert not c.out.exists()
    words = ["--bundle", "b", "--data", "d", "--out", "o", "--train.steps", "1"]
    assert cli.main(["sft", *words, "--lora.rank", "0"]) == 2
    assert "lora.rank must be at least 1, or null to train every weight, got 0" in capsys.readouterr().err


def test_an_export_takes_the_adapter_along_for_peft_and_can_be_replaced(
    run_config, bundle, tokenizer, tmp_path, capsys
):
    sft.run(c := run_config(steps=1, lora=LORA))
    words = ["--adapter", str(c.out / "adapter"), "--out", str(tmp_path / "export")]
    assert cli.main(["export", str(bundle), *words]) == 0
    assert cli.main(["export", str(bundle), *words, "--force"]) == 0
    files = {file.name for file in (tmp_path / "export" / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert cli.main(["export", str(bundle), *words, "--force", "--format", "deepseek-v3"]) == 2
    assert "--adapter needs --format compact or gguf, got deepseek-v3; export the merged" in capsys.readouterr().err
    for dry in ([], ["--dry_run"]):
        assert cli.main(["export", str(bundle), *words, "--force", "--format", "gguf", *dry]) == 2
        said = capsys.readouterr().err
        assert "llama.cpp ignores the adapter of q_a_proj, q_b_proj, kv_a_proj, kv_b_proj; train one with" in said
    assert (tmp_path / "export" / "adapter").exists()  # nothing is lost
    other = untrained(tmp_path / "other", SHAPE, tokenizer, seed=1)
    assert cli.main(["export", str(other), *words, "--force"]) == 2
    assert "give the bundle it was trained on" in capsys.readouterr().err


# GRPO: what samples, and what the policy is held to.


def the_engine_samples_with_the_adapter(grpo_config) -> None:
    grpo.run(c := grpo_config())
    learned = [line for line in told(c.out)[1:] if "sampling/sampling_logp_difference/max" in line]
    assert len(learned) > 1
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in learned)


def test_the_engine_samples_with_the_adapter(grpo_config):
    the_engine_samples_with_the_adapter(grpo_config)


def test_bug_the_engine_samples_from_the_base(grpo_config, monkeypatch):
    monkeypatch.setattr(
        train_state, "merged", lambda weights, scale: {n: w for n, w in weights.items() if "lora_" not in n}
    )
    with pytest.raises(AssertionError):
        the_engine_samples_with_the_adapter(grpo_config)


def the_reference_is_the_base(grpo_config, bundle) -> None:
    """The same numbers as with a copy of it."""
    free, copied = grpo_config("free"), grpo_config("copied", reference=bundle)
    for c in (free, copied):
        grpo.run(c)
    assert told(free.out)[-1]["kl"] > 0
    for own, other in zip(told(free.out), told(copied.out), strict=True):
        assert own.keys() == other.keys()
        assert all(own[key] == pytest.approx(other[key], abs=1e-6) for key in own if key != "expert_load")


def test_the_reference_is_the_base(grpo_config, bundle):
    the_reference_is_the_base(grpo_config, bundle)


def test_bug_the_reference_is_the_policy(grpo_config, bundle, monkeypatch):
    """huggingface/trl#5222: the adapter is not switched off, so nothing is ever far from the reference."""
    monkeypatch.setattr(grpo_step, "base_logprobs", grpo_step.frozen_logprobs)
    with pytest.raises(AssertionError):
        the_reference_is_the_base(grpo_config, bundle)


def test_grpo_resumed_is_uninterrupted(grpo_config, monkeypatch):
    whole, parts = grpo_config("whole"), grpo_config("parts")
    grpo.run(whole)
    with interrupted(monkeypatch, grpo.Collector, "collect", after=3):
        grpo.run(parts)
    grpo.run(parts)
    assert weights_of(parts.out) == weights_of(whole.out)
    assert told(parts.out) == told(whole.out)
