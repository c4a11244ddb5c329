"""Define a task, its questions and its grader, and train on it with GRPO.

  command   python examples/grpo_own_task.py runs/example/pretrain/bundle
  before    python examples/train.py (or any other base model)
  hardware  two CPU cores
  time      under a minute
  expected  6 % of the test questions answered correctly before GRPO, 75 % after

The question is "Name a number between 23 and 43."; any such number is correct. The lessons teach only the form of a
reply: their numbers are random, and one in five is correct. GRPO teaches which ones are, from graded replies.
"""

import argparse
import json
import re
from pathlib import Path
from random import Random

from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import TaskConfig
from nanollm.stages import grpo, preprocess, sft
from nanollm.train.optim import OptimConfig

GENTLE = {"warmup_steps": 5, "weight_decay": 0.0, "balance_rate": 0.0}


class Between:
    """The task, passed to grpo as grpo_own_task:Between. It needs these two methods and no base class."""

    def problems(self, split: str) -> list[Problem]:
        draw = Random(split)
        lows = [draw.randint(10, 79) for _ in range({"train": 5000, "test": 500}[split])]
        return [Problem(f"Name a number between {low} and {low + 20}.", str(draw.randint(10, 99))) for low in lows]

    def grade(self, problem: Problem, reply: str) -> bool:
        low, high = map(int, re.findall("[0-9]+", problem.question))
        return re.fullmatch("[0-9]+", reply) is not None and low < int(reply) < high


def imitate(bundle: Path, out: Path, steps: int) -> Path:
    """Instruction tuning on conversations of the task: the model learns to answer with a number and stop."""
    chats = [[("user", problem.question), ("assistant", problem.answer)] for problem in Between().problems("train")]
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    lessons = out / "lessons.jsonl"
    lessons.parent.mkdir(parents=True, exist_ok=True)
    lessons.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokens = {"tokenizer_path": bundle / "tokenizer.model", "save_dir": out / "lessons"}
    preprocess.run(preprocess.Config(kind="chat", input=[lessons], **tokens))
    train, optim = sft.ChatTrainConfig(steps=steps, batch_size=64, micro_batch_size=8), OptimConfig(lr=5e-3, **GENTLE)
    return sft.run(sft.Config(bundle=bundle, data=out / "lessons", out=out / "sft", train=train, optim=optim))


def reinforce(bundle: Path, out: Path, steps: int) -> Path:
    """GRPO: of 16 replies to a question, those that the task accepts become more likely."""
    c = grpo.Config(
        bundle=bundle,
        out=out / "grpo",
        task=TaskConfig(name="grpo_own_task:Between"),
        train=grpo.GrpoTrainConfig(steps=steps, validate_every=20),
        rollout=RolloutConfig(prompts=32, group_size=16, max_tokens=6),
        optim=OptimConfig(name="adamw", lr=1e-3, betas=(0.9, 0.99), **GENTLE),
        dtype="float32",
    )
    return grpo.run(c)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train on your own task.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/example-grpo"))
    parser.add_argument("--lessons", type=int, default=40, help="steps of instruction tuning")
    parser.add_argument("--steps", type=int, default=100, help="steps of reinforcement learning")
    given = parser.parse_args()
    print(reinforce(imitate(given.bundle, given.out, given.lessons), given.out, given.steps))
