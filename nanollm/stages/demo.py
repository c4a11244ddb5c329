"""The whole journey in minutes: tokenizer, pretraining, instruction tuning and GRPO on built-in text, offline."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanollm.bundle import load_bundle
from nanollm.config import check_seed, load_config
from nanollm.durable import write_file, write_json
from nanollm.evals.problems import Accuracy, Judged, judge, solve
from nanollm.evals.stats import paired
from nanollm.model.config import ModelConfig
from nanollm.progress import duration, say
from nanollm.report.page import PAGE
from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.builtin import BUILTIN
from nanollm.sources.tasks import TaskConfig
from nanollm.sources.word_problems import WordProblems
from nanollm.stages import grpo, preprocess, pretrain, sft, tokenizer
from nanollm.stages.preprocess import WordsConfig
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from nanollm.train.run import TrainConfig
from nanollm.train.step import SIGMAS
from nanollm.world import World

TOKENS_PER_STEP = 4096
PROMPTS = ["Return the", "The function", "This module", "If the argument is"]
SPELLED_PROBLEMS = 4000  # that the tokenizer sees beside the documentation
LARGEST = 5  # number in a question: few facts of arithmetic, so that minutes are enough to learn them
LESSONS_PER_STEP = 64
MAX_REPLY = 72  # tokens
LADDER = ("test", "new_numbers", "heldout")  # splits, each further away from what was trained on
MODELS = ("pretrain", "sft", "grpo")
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a tokenizer and a small model on this machine's own documentation, teach it to solve school problems by
    worked solutions, then by its own replies: offline, two CPU cores, minutes."""

    out: Path = Path("runs/demo")
    """Folder for everything that is made. An interrupted demo goes on there."""
    model: str = "nano-1m"
    """Preset of the model."""
    steps: int = 350
    """Optimizer steps of pretraining, 4,096 tokens each."""
    sft_steps: int = 140
    """Optimizer steps of instruction tuning, 64 worked solutions each."""
    grpo_steps: int = 150
    """Steps of reinforcement learning, 256 replies each."""
    exam: int = 500
    """Problems of each split that the models are compared on."""
    seed: int = 0
    """Starts the weights, the order of the data and the replies."""

    def __post_init__(self) -> None:
        for name in ("steps", "sft_steps", "grpo_steps", "exam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_seed(self.seed)


@dataclass(frozen=True)
class Step:
    """One step of the journey, its name in summary.json, and the work."""

    name: str
    title: str
    work: Callable[[], Path]


def run(c: Config) -> Path:
    """Do what is not done yet; returns summary.json."""
    model: ModelConfig = load_config("model", c.model, ModelConfig)
    path = c.out / "summary.json"
    summary = begin(c, path)
    steps = journey(c, model)
    for number, step in enumerate(steps, start=1):
        say(f"\n[{number}/{len(steps)}] {step.title}")
        if step.name in summary["made"] and Path(summary["made"][step.name]).exists():
            say(f"done before, in {duration(summary['seconds'][step.name])}")
            continue
        started = time.monotonic()
        try:
            summary["made"][step.name] = step.work().as_posix()
        finally:  # the seconds of a stopped step count too
            spent = summary["seconds"].get(step.name, 0) + time.monotonic() - started
            summary["seconds"][step.name] = round(spent, 1)
            write_json(path, summary)
    summary |= {"pretrain": outcome(c.out / "pretrain")} | json.loads((c.out / "exam.json").read_bytes())
    write_json(path, summary)
    say(next_commands(c, summary))
    return path


def begin(c: Config, path: Path) -> dict[str, Any]:
    """The summary of an earlier demo in the same folder with the same settings, or an empty one."""
    chosen = {name: value for name, value in asdict(c).items() if name != "out"}
    if not path.exists():
        c.out.mkdir(parents=True, exist_ok=True)
        return {"settings": chosen, "seconds": {}, "made": {}}
    summary: dict[str, Any] = json.loads(path.read_bytes())
    if summary["settings"] != chosen:
        raise ValueError(
            f"{c.out} holds a demo with {summary['settings']}, this one has {chosen}; choose another --out"
        )
    return summary


def journey(c: Config, model: ModelConfig) -> list[Step]:
    """The steps, nearly each a verb that a user can call alone."""
    spelled = c.out / "problems.txt"
    learn = tokenizer.Config(
        corpus=[BUILTIN, str(spelled)], output_dir=c.out / "tokenizer", vocab_size=model.vocab_size, seed=c.seed
    )
    encode = preprocess.Config(
        kind="text", input=[Path(BUILTIN)], tokenizer_path=learn.model_path, save_dir=c.out / "tokens", seed=c.seed
    )
    lessons = preprocess.Config(
        kind="words",
        words=WordsConfig(levels=[1, 2], largest=LARGEST, count=LESSONS_PER_STEP * c.sft_steps + 200),
        tokenizer_path=learn.model_path,
        save_dir=c.out / "lessons",
        seed=c.seed,
    )
    pretraining, tuning, reinforcing = pretrain_config(c, model, learn.model_path), sft_config(c), grpo_config(c)
    return [
        Step(
            "problems",
            f"{SPELLED_PROBLEMS:,} school problems, so that the tokenizer knows their words",
            lambda: write_problems(spelled),
        ),
        Step("tokenizer", f"a tokenizer of {model.vocab_size:,} pieces", lambda: tokenizer.run(learn)),
        Step("preprocess", "the corpus as token files", lambda: preprocess.run(encode)),
        Step(
            "pretrain",
            f"{c.model}: {model.total_parameters:,} parameters learn to write",
            lambda: pretrain.run(pretraining),
        ),
        Step("lessons", "problems with worked solutions as token files", lambda: preprocess.run(lessons)),
        Step("sft", "the model learns to reply, from worked solutions", lambda: sft.run(tuning)),
        Step("grpo", "its own replies teach the model: right ones become likelier", lambda: grpo.run(reinforcing)),
        Step("exam", f"{c.exam:,} problems of each split that nobody has trained on", lambda: examine(c)),
    ]


def write_problems(path: Path) -> Path:
    """Problems and their solutions as text, one after the other."""
    problems = WordProblems(levels=(1, 2), largest=LARGEST).problems("train")[:SPELLED_PROBLEMS]
    write_file(path, "\n\n".join(f"{each.question}\n{each.answer}" for each in problems).encode())
    return path


def pretrain_config(c: Config, model: ModelConfig, tokenizer_path: Path) -> pretrain.Config:
    return pretrain.Config(
        model=model,
        tokenizer_path=tokenizer_path,
        data=c.out / "tokens",
        out=c.out / "pretrain",
        train=TrainConfig(
            steps=c.steps,
            batch_size=max(1, TOKENS_PER_STEP // model.context_length),
            micro_batch_size=max(1, TOKENS_PER_STEP // model.context_length),
            validate_every=max(1, c.steps // 7),
            save_every=max(1, c.steps // 7),
        ),
        optim=OptimConfig(lr=1.5e-2, warmup_steps=c.steps // 20, balance_rate=0.01, spike_sigmas=SIGMAS),
        seed=c.seed,
        sample_prompts=PROMPTS,
    )


def sft_config(c: Config) -> sft.Config:
    return sft.Config(
        bundle=c.out / "pretrain" / "bundle",
        data=c.out / "lessons",
        out=c.out / "sft",
        train=sft.ChatTrainConfig(
            steps=c.sft_steps, batch_size=LESSONS_PER_STEP, micro_batch_size=10, validate_every=50, save_every=50
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=10, weight_decay=0.0, balance_rate=0.0, spike_sigmas=SIGMAS),
        seed=c.seed,
        sample_prompts=["Anna has 4 apples and buys 5 more. How many apples does she have?"],
    )


def grpo_config(c: Config) -> grpo.Config:
    return grpo.Config(
        bundle=c.out / "sft" / "bundle",
        task=TaskConfig(levels=[2], largest=LARGEST),
        out=c.out / "grpo",
        train=grpo.GrpoTrainConfig(steps=c.grpo_steps, validate_every=30, save_every=30),
        rollout=RolloutConfig(prompts=32, group_size=8, max_tokens=MAX_REPLY),
        optim=OptimConfig(
            name="adamw",
            lr=3e-4,
            betas=(0.9, 0.99),
            eps=1e-6,
            schedule="wsd",
            warmup_steps=20,
            weight_decay=0.0,
            balance_rate=0.0,
        ),
        seed=c.seed,
        dtype="float32",  # as fast as bfloat16 at this size, and engine and trainer agree to the last digits
    )


def examine(c: Config) -> Path:
    """Two-step problems of each split, solved greedily by each of the three models; written to exam.json."""
    task, world = WordProblems(levels=(2,), largest=LARGEST), World.start()
    judged: dict[str, dict[str, Judged]] = {}
    for name in MODELS:
        bundle = load_bundle(c.out / name / "bundle", world.dtype, world.device)
        judged[name] = {}
        for split in LADDER[:1] if name == "pretrain" else LADDER:
            problems, called = task.problems(split)[: c.exam], f"exam of {name}, {split}"
            attempts = solve(bundle.model, bundle.tokenizer, problems, max_tokens=MAX_REPLY, called=called)
            judged[name][split] = judge(attempts, {"strict": task.grade})
    write_json(c.out / "exam.json", report(judged))
    return c.out / "exam.json"


def report(judged: dict[str, dict[str, Judged]]) -> dict[str, Any]:
    """What summary.json says of instruction tuning and of reinforcement learning: before, after, and how surely."""
    right = {model: {split: each.first("strict") for split, each in splits.items()} for model, splits in judged.items()}
    base, tuned, reinforced = (right[model]["test"] for model in MODELS)
    change = paired(reinforced, tuned)
    attempts = [judged[model]["test"].attempts for model in MODELS]
    shown = [place for place in range(len(tuned)) if reinforced[place] and not tuned[place]][:SHOWN]
    return {
        "sft": before_and_after(base, tuned),
        "grpo": before_and_after(tuned, reinforced)
        | {"difference": change.difference, "difference_interval": [change.low, change.high], "p": change.p}
        | {split: before_and_after(right["sft"][split], right["grpo"][split]) for split in LADDER[1:]},
        "solved_now": [
            {
                "question": attempts[0][place].problem.question,
                **{model: each[place].replies[0] for model, each in zip(MODELS, attempts, strict=True)},
            }
            for place in shown
        ],
    }


def before_and_after(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Accuracies with their 95 % intervals."""
    summary: dict[str, Any] = {"n": len(after)}
    for name, verdicts in (("accuracy_before", before), ("accuracy_after", after)):
        score = Accuracy.of(verdicts)
        summary |= {name: score.value, f"{name}_interval": [score.low, score.high]}
    return summary


def outcome(folder: Path) -> dict[str, Any]:
    """Bits per byte before and after, and the samples of both moments."""
    lines = read_metrics(folder)
    first, last = lines[0], lines[-1]
    rates = sorted(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)
    return {
        "val_bpb_before": first["val_bpb"],
        "val_bpb_after": last["val_bpb"],
        "tokens_per_s": rates[len(rates) // 2],
        "prompts": PROMPTS,
        "samples_before": first["samples"],
        "samples_after": last["samples"],
    }


def next_commands(c: Config, summary: dict[str, Any]) -> str:
    """What was reached, what the model writes and solves now, and what to type next."""
    learned, tuned, reinforced = summary["pretrain"], summary["sft"], summary["grpo"]
    nanollm = command()
    lines = ["", "The model continues a text it has never seen:"]
    for prompt, before, after in zip(PROMPTS, learned["samples_before"], learned["samples_after"], strict=True):
        lines += [f"  before  {_shorten(prompt + before)}", f"  after   {_shorten(prompt + after)}", ""]
    if summary["solved_now"]:
        lines.append("Problems that only its own replies taught it to solve:")
    for solved in summary["solved_now"]:
        lines += [f"  {solved['question']}"]
        lines += [f"    {name:9}{_shorten(solved[name])}" for name in MODELS] + [""]
    lines += [
        f"Bits per byte of unseen text: {learned['val_bpb_before']:.2f} before pretraining, "
        f"{learned['val_bpb_after']:.2f} after.",
        f"New two-step problems solved, of {reinforced['n']}: {_percent(tuned, 'before')} after pretraining, "
        f"{_percent(tuned, 'after')} after worked solutions, {_percent(reinforced, 'after')} after its own replies",
        f"(difference {reinforced['difference']:+.1%}, p = {reinforced['p']:.1g}; with numbers new to the story "
        f"{_percent(reinforced['new_numbers'], 'before')} and then {_percent(reinforced['new_numbers'], 'after')}, "
        f"stories it never met {_percent(reinforced['heldout'], 'before')} and then "
        f"{_percent(reinforced['heldout'], 'after')}).",
        f"All in {duration(sum(summary['seconds'].values()))}.",
        f"Look: {', '.join(str(c.out / name / PAGE) for name in MODELS)}",
        f'Next:  {nanollm} generate {c.out / "pretrain" / "bundle"} --prompt "The function returns"',
        f"       {nanollm} chat {c.out / 'grpo' / 'bundle'}      and ask it: {QUESTION}",
        f"       {nanollm} serve {c.out / 'grpo' / 'bundle'}     and ask it in the browser",
        f"       {nanollm} eval {c.out / 'grpo' / 'bundle'} --against {c.out / 'sft' / 'bundle'} "
        f"--task.name words --task.levels 2 --task.largest {LARGEST}",
        "       and the road to the 327M model in README.md",
    ]
    return "\n".join(lines)


QUESTION = "Tom has 5 cups. Rosa has 3 times as many cups as Tom. How many cups do they have together?"


def command() -> str:
    """What starts this program here, as short as it can be typed; `make demo` runs where it may not be on the PATH."""
    if shutil.which("nanollm"):
        return "nanollm"
    beside = shutil.which("nanollm", path=str(Path(sys.executable).parent))
    return min(beside, os.path.relpath(beside), key=len) if beside else f"{sys.executable} -m nanollm"


def _percent(scores: dict[str, Any], moment: str) -> str:
    low, high = scores[f"accuracy_{moment}_interval"]
    return f"{scores[f'accuracy_{moment}']:.1%} ({low:.0%} to {high:.0%})"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 110 else line[:107] + "..."
