"""The whole journey, from token files to a model that learned from its replies, by two processes as by one."""

import dataclasses
import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from nanollm.train.metrics import TIMED, read_metrics
from tests.ranks.launch import ROOT, running
from tests.stages.conftest import MODEL, untrained

pytestmark = pytest.mark.dist

SHORT = [
    *("--train.steps", "3", "--train.log_every", "1", "--train.save_every", "2"),
    *("--dtype", "float32", "--device", "cpu"),
]
GRPO = [
    *("--task.name", "words", "--task.largest", "5"),
    *("--rollout.prompts", "3", "--rollout.group_size", "3", "--rollout.max_tokens", "8"),
]
LORA = ["--lora.rank", "3", "--optim.name", "adamw", "--optim.lr", "1e-3"]
EVEN = ["--task.name", "tests.faults.even:Even", "--objective.beta", "0.1"]  # an untrained model earns both rewards


def alone(arguments):
    command = [sys.executable, "-m", "nanollm", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def by_two(arguments, log, parallel):
    with running(2, [*map(str, arguments), "--parallel", parallel], log) as job:
        assert job.wait(300) == 0, log.read_text()[-3000:]


def numbers(folder):
    """Those of the metrics that do not tell the time."""
    return [
        {key: value for key, value in line.items() if isinstance(value, int | float) and key not in TIMED}
        for line in read_metrics(folder)
    ]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_sft_grpo_prefer_and_distill_of_two_processes_give_what_one_gives(
    tokenizer, tokenizer_path, tmp_path, parallel
):
    bundle = untrained(tmp_path / "untrained", dataclasses.replace(MODEL, context_length=256), tokenizer)
    words = ["--words.count", 200, "--words.largest", 5, "--val_fraction", 0.1]
    alone(["preprocess", "words", *words, "--tokenizer_path", tokenizer_path, "--save_dir", tmp_path / "words"])
    stages = {
        "sft": ["--bundle", bundle, "--data", tmp_path / "words", "--train.batch_size", 8],
        "grpo": ["--bundle", tmp_path / "sft-alone" / "bundle", *GRPO, "--validation_problems", 5],
        "sft-lora": ["--bundle", bundle, "--data", tmp_path / "words", "--train.batch_size", 8, *LORA],
        "grpo-lora": ["--bundle", bundle, *EVEN, *GRPO[4:], *LORA, "--validation_problems", 5],
    }
    pairs = [{"prompt": f"Say {n}!", "chosen": "1" * n, "rejected": "No."} for n in range(1, 12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pairs = ["--bundle", bundle, "--data", tmp_path / "pairs.jsonl", "--val_data", tmp_path / "pairs.jsonl"]
    pairs += ["--train.batch_size", 5, "--train.micro_batch_size", 1, "--optim.lr", 3e-3]
    stages |= {f"prefer {loss}": [*pairs, "--objective.loss", loss] for loss in ("dpo", "kto")}
    stages["prefer dpo-lora"] = [*stages["prefer dpo"], *LORA]
    teacher = untrained(tmp_path / "teacher", dataclasses.replace(MODEL, context_length=256), tokenizer, seed=1)
    taught = ["--bundle", bundle, "--teacher", teacher, *GRPO[:4], "--validation_problems", 5]
    texts = ["--mode", "logits", "--data", tmp_path / "words", "--train.batch_size", 8]
    stages |= {"distill": [*taught, *GRPO[4:]], "distill logits": [*taught, *texts]}
    stages |= {"distill-lora": [*stages["distill"], *LORA]}
    for name, options in stages.items():
        stage, *_ = name.replace("-", " ").split()
        one, two = (tmp_path / f"{name}-{which}" for which in ("alone", "two"))
        alone([stage, *SHORT, *options, "--out", one])
        by_two([stage, *SHORT, *options, "--out", two], tmp_path / "log", parallel)
        for own, other in zip(numbers(one), numbers(two), strict=True):
            assert other == pytest.approx(own, abs=1e-4)
        weights = [load_file(folder / "bundle" / "model.safetensors") for folder in (one, two)]
        if LORA[0] in options:
            adapter = load_file(two / "adapter" / "adapter.safetensors")
            assert all(tensor.abs().max() > 0 for tensor in adapter.values())
        assert all((weights[0][key] - weights[1][key]).abs().max() < 1e-4 for key in weights[0])
