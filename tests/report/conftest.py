"""Folders of runs as the stages write them, with numbers made for looking at."""

import dataclasses
import json
import math

import pytest

from nanollm.config import to_yaml
from tests.stages.conftest import MODEL, run_config, token_files, tokenizer_path

__all__ = ["run_config", "token_files", "tokenizer_path"]

HOSTILE = "</style><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"


def metrics(steps, **shift):
    """Lines of a run of pretraining; `shift` moves numbers."""
    yield {"step": 0, "val_bpb": 4.0, "samples": [HOSTILE]}
    for step in range(1, steps + 1):
        share = 0.5 + 0.5 * step / steps  # of the first expert of the last block: all of it at the end
        yield {
            "step": step,
            "loss": 3 + 5 / step + 0.2 * math.sin(9 * step) + shift.get("loss", 0),
            "grad_norm": 1 / step,
            "lr": 1e-3 * step,
            "expert_load": [[0.4, 0.6], [share, 1 - share]],
            "tokens_per_s": 1000.0 + step,
            "seconds": 36.0,
            "peak_memory_gb": 1.5,
        } | ({"val_bpb": 2.0, "samples": ["a <b>bold</b> text"]} if step == steps else {})


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, lines=..., **settings): the folder of a run of pretraining, without checkpoints."""

    def write(name="run", lines=None, **settings):
        folder = tmp_path / name
        folder.mkdir()
        train = {"steps": 100, "batch_size": 4} | settings.pop("train", {})
        (folder / "config.yaml").write_text(
            to_yaml(
                {
                    "model": dataclasses.replace(MODEL, n_blocks=8),
                    "train": train,
                    "sample_prompts": ["Once & upon"],
                    "data": "gone",
                }
                | settings
            )
        )
        (folder / "inputs.json").write_text(json.dumps({"data": "d" * 64, "tokenizer": "e" * 64}))
        lines = list(metrics(train["steps"])) if lines is None else lines
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def grpo_metrics(steps):
    for step in range(steps + 1):
        value = 0.5 + step / 300
        solved = {"val_accuracy": value, "val_accuracy_low": value - 0.1, "val_accuracy_high": value + 0.1}
        solved |= {"val_accuracy_n": 200}
        numbers = {"reward": step / steps, "reward_std": 0.1, "reward_grade": 0.5, "reward_length": -0.1, "kl": 0.01}
        numbers |= {"entropy": 1.0, "clip_fraction": 0.0, "frac_reward_zero_std": 0.375, "groups": 8}
        numbers |= {"completions/mean_length": 40.0, "completions/clipped_ratio": 0.1}
        yield {"step": step} | (numbers if step else {}) | (solved if step % 10 == 0 else {})


@pytest.fixture
def grpo_run(write_run):
    """The folder of a run of GRPO, with replies and an evaluation against what it began with."""
    settings = {"rollout": {"prompts": 4}, "task": {"name": "words"}, "bundle": "runs/sft/bundle"}
    folder = write_run("grpo", lines=list(grpo_metrics(100)), **settings)
    (folder / "rollouts").mkdir()
    records = [
        {"question": question, "answer": "#### 5", "reply": f"{question} {HOSTILE} #### {reward}", "reward": reward}
        | {"parts": {}, "advantage": reward - 0.5, "tokens": 9, "stop": "end", "trained": taught}
        for question, taught in (("What is dull?", False), ("What is 2 + 3?", True))
        for reward in (0.0, 1.0)
    ]
    (folder / "rollouts" / "step-00000100.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    score = {"value": 0.62, "low": 0.6, "high": 0.64, "n": 500}
    evaluation = {
        "settings": {"task": {"name": "words", "split": "test"}},
        "bundle": {"path": "runs/grpo/bundle", "greedy": {"scores": {"strict": score}}},
        "against": {"path": "runs/sft/bundle", "greedy": {"scores": {"strict": score | {"value": 0.5}}}},
        "difference": {"strict": {"difference": 0.12, "low": 0.08, "high": 0.16, "p": 0.0012}},
        "contamination": {"overlaps": [{}], "questions": 500, "n": 13},
    }
    (folder / "eval" / "words-test").mkdir(parents=True)
    (folder / "eval" / "words-test" / "eval.json").write_text(json.dumps(evaluation))
    return folder
