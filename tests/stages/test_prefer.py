"""Preferences teach a model which reply to give; what cannot be used is refused or counted."""

import dataclasses
import json
import re

import pytest
import torch

from nanollm import cli
from nanollm.bundle import load_bundle
from nanollm.config import parse_options
from nanollm.rl.preference import PreferenceConfig
from nanollm.stages import prefer
from nanollm.stages.prefer import Config, PreferTrainConfig
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from tests.stages.conftest import FILES_OF_A_RUN, MODEL, told, untrained, weights_of

SHAPE = dataclasses.replace(MODEL, context_length=64)
LOSSES = ("dpo", "ipo", "simpo", "kto")


@pytest.fixture(scope="session")
def bundle(tokenizer, tmp_path_factory):
    """A model that has learned nothing yet."""
    return untrained(tmp_path_factory.mktemp("base") / "bundle", SHAPE, tokenizer)


def written(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in records))
    return path


def pair(n, **changes):
    return {"prompt": f"What comes after {n}?", "chosen": f"{n + 1}.", "rejected": f"{n} is all I know."} | changes


@pytest.fixture
def pairs(tmp_path):
    return written(tmp_path / "pairs.jsonl", [pair(n) for n in range(20)])


@pytest.fixture
def run_config(bundle, pairs, tmp_path):
    """run_config(out=..., steps=..., loss=..., **fields of Config): a run of seconds in float32."""

    def make(steps: int = 10, out: str = "run", loss="dpo", **fields) -> Config:
        defaults = {
            "bundle": bundle,
            "data": pairs,
            "out": tmp_path / out,
            "train": PreferTrainConfig(
                steps=steps, batch_size=8, micro_batch_size=2, log_every=1, validate_every=5, save_every=3
            ),
            "objective": PreferenceConfig(loss=loss),
            "optim": OptimConfig(lr=3e-3, warmup_steps=2),
            "dtype": "float32",
        }
        return Config(**defaults | fields)

    return make


# A run.


@pytest.mark.parametrize("loss", LOSSES)
def test_the_margin_rises_on_pairs_that_are_trained_and_on_others(run_config, bundle, tmp_path, loss):
    others = written(tmp_path / "others.jsonl", [pair(n) for n in range(20, 30)])
    c = run_config(loss=loss, val_data=others)
    made = prefer.run(c)
    assert {path.name for path in c.out.iterdir()} == FILES_OF_A_RUN
    lines = read_metrics(c.out)
    first, last = lines[1], lines[-1]
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"] + 0.01
    assert lines[-1]["val_rewards/margins"] > lines[0]["val_rewards/margins"] + 0.01
    assert ("kl" in last) == (loss == "kto")
    assert ("rewards/accuracies" in last) == (loss != "kto")
    if loss != "simpo":  # before training the policy is the reference
        assert abs(first["rewards/chosen"]) + abs(lines[0]["val_rewards/chosen"]) < 1e-5
    provenance, parent = load_bundle(made).provenance, load_bundle(bundle).provenance
    assert provenance["parent"] == parent
    assert ("reference" in provenance["inputs"]) == (loss != "simpo")
    page = (c.out / "report.html").read_text()
    assert "Learning from preferences" in page
    assert "nats per trained token" not in page
