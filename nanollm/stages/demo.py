"""The whole journey in minutes: tokenizer, pretraining, instruction tuning and GRPO on built-in text, offline."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

from nanollm import __version__
from nanollm.bundle import PROVENANCE, load_bundle
from nanollm.config import CONFIGS, check_at_least, check_seed, load_config, parse_options
from nanollm.durable import make_folder, sha256_of, write_file, write_json
from nanollm.evals.problems import Accuracy, Attempt, Judged, judge, solve
from nanollm.evals.results import difference, greedy_figures
from nanollm.evals.stats import Figures, paired
from nanollm.generate.tools import tool_caller
from nanollm.model.config import ModelConfig
from nanollm.progress import Progress, duration, say
from nanollm.report.page import PAGE, write_report
from nanollm.sources.builtin import documents
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
LARGEST = 100  # number in a question; the calculator does the sums, so the model learns which ones
TOOLS = ["calculator"]
MODELS = ("pretrain", "sft", "grpo")
SPLITS = ("test", "heldout")  # of the exam: stories that were trained on with other names and numbers, and new stories
SHOWN, WIDTH = 3, 110  # problems, characters of a line


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a tokenizer and a small model on documentation that is already on this machine, then teach it math word
    problems, first by worked solutions, then by GRPO. Runs offline, in minutes, on two CPU cores."""

    out: Path = Path("runs/demo")
    """Folder for all results. The same command resumes an interrupted demo there."""
    model: str = "nano-1m"
    """Preset of the model."""
    steps: int = 350
    """Optimizer steps of pretraining, 4,096 tokens each."""
    sft_steps: int = 400
    """Optimizer steps of instruction tuning, 13 conversations with 16 worked solutions each."""
    grpo_steps: int = 70
    """Steps of reinforcement learning, 256 replies each."""
    exam: int = 500
    """Number of problems in each part of the final exam."""
    seed: int = 0
    """Random seed of the weights, the data order and the replies."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps", "sft_steps", "grpo_steps", "exam")
        check_seed(self.seed)


Step = tuple[str, str, Callable[[], Path]]  # its name in summary.json, its title, and the work


def run(c: Config) -> Path:
    """Do what is not done yet; returns summary.json."""
    model: ModelConfig = load_config("model", c.model, ModelConfig)
    path = c.out / "summary.json"
    summary = begin(c, path)
    steps = journey(c, model)
    for number, (name, title, work) in enumerate(steps, start=1):
        say(f"\n[{number}/{len(steps)}] {title}")
        if name in summary["made"] and Path(summary["made"][name]).exists():
            say(f"done before, in {duration(summary['seconds'][name])}")
            continue
        started = time.monotonic()
        try:
            summary["made"][name] = work().as_posix()
        finally:  # the seconds of a stopped step count too
            spent = summary["seconds"].get(name, 0) + time.monotonic() - started
            summary["seconds"][name] = round(spent, 1)
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
    corpus, spelled = c.out / "corpus.jsonl", c.out / "problems.txt"
    learn = tokenizer.Config(
        corpus=[str(corpus), str(spelled)], output_dir=c.out / "tokenizer", vocab_size=model.vocab_size, seed=c.seed
    )
    encode = preprocess.Config(
        kind="text", input=[corpus], tokenizer_path=learn.model_path, save_dir=c.out / "tokens", seed=c.seed
    )
    tuning = recipe("sft", sft, c, "pretrain", c.sft_steps, f"--data={c.out / 'lessons'}")
    reinforcing = recipe("grpo", grpo, c, "sft", c.grpo_steps, f"--task.largest={LARGEST}")
    lessons = preprocess.Config(
        kind="words",
        words=WordsConfig(levels=[1, 2], largest=LARGEST, count=(tuning.train.batch_size * c.sft_steps + 200) * 5 // 4),
        tools=TOOLS,
        tokenizer_path=learn.model_path,
        save_dir=c.out / "lessons",
        seed=c.seed,
    )
    pretraining = pretrain_config(c, model, learn.model_path)
    writing = f"{c.model}: {model.total_parameters:,} parameters learn to write"
    return [
        ("corpus", "the documentation on this machine", lambda: write_corpus(corpus)),
        ("problems", f"{SPELLED_PROBLEMS:,} word problems for the tokenizer", lambda: write_problems(spelled)),
        ("tokenizer", f"a tokenizer of {model.vocab_size:,} pieces", lambda: tokenizer.run(learn)),
        ("preprocess", "the corpus as token files", lambda: preprocess.run(encode)),
        ("pretrain", writing, lambda: pretrain.run(pretraining)),
        ("lessons", "problems with worked solutions as token files", lambda: preprocess.run(lessons)),
        ("sft", "the model learns to reply, from worked solutions", lambda: sft.run(tuning)),
        ("grpo", "its own replies teach the model: right ones become likelier", lambda: grpo.run(reinforcing)),
        (
            "exam",
            f"{c.exam:,} new problems, and {c.exam:,} of stories that are new too",
            lambda: examine(c, reinforcing.rollout.max_tokens),
        ),
    ]


def write_corpus(path: Path) -> Path:
    """The documentation on this machine, a line of JSON for each document: it is read twice, and slow to collect."""
    lines = []
    with Progress("collect", unit="documents") as bar:
        for text in documents():
            lines.append(json.dumps({"text": text}) + "\n")
            bar.advance()
    write_file(path, "".join(lines).encode())
    return path


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
        start="fast",
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


def recipe(verb: str, stage: ModuleType, c: Config, start: str, steps: int, *more: str) -> Any:
    """The settings of configs/VERB/nano-1m-words.yaml, on what this demo has made."""
    paths = [f"--config={CONFIGS / verb / 'nano-1m-words.yaml'}", f"--bundle={c.out / start / 'bundle'}"]
    words = [*paths, f"--out={c.out / verb}", f"--train.steps={steps}", f"--seed={c.seed}", *more]
    return parse_options(verb, stage, words)[0]


def examine(c: Config, max_reply: int) -> Path:
    """Two-step problems, solved greedily by each of the three models; written to exam.json."""
    task, world = WordProblems(levels=(2,), largest=LARGEST), World.start()
    judged: dict[str, dict[str, Judged]] = {split: {} for split in SPLITS}
    for name in MODELS:
        bundle = load_bundle(c.out / name / "bundle", world.dtype, world.device)
        for split in SPLITS[:1] if name == "pretrain" else SPLITS:
            attempts = solve(
                bundle.model,
                bundle.tokenizer,
                task.problems(split)[: c.exam],
                max_tokens=max_reply,
                tool=tool_caller(bundle),
                called=f"exam of {name}, {split}",
            )
            judged[split][name] = judge(attempts, {"strict": task.grade})
    write_json(c.out / "exam.json", report(*judged.values()))
    for before, name in pairwise(MODELS):
        for split, of_models in judged.items():
            write_evaluation(c.out, world, split, of_models, name, before)
        write_report(c.out / name, world)
    return c.out / "exam.json"


def write_evaluation(out: Path, world: World, split: str, judged: Mapping[str, Judged], name: str, before: str) -> None:
    """A part of the exam beside a model, as nanollm eval writes it: its page and its model card read it there."""
    settings = {"task": {"name": "words", "split": split}, **world.names}
    evaluation: Figures = {"settings": settings, "made_by": f"nanollm {__version__} demo"}
    for side, model in (("bundle", name), ("against", before)):
        if model in judged:
            bundle = out / model / "bundle"
            evaluation[side] = {"path": str(bundle), "digest": sha256_of(bundle / PROVENANCE)}
            evaluation[side]["greedy"] = greedy_figures(judged[model])
    if before in judged:
        evaluation["difference"] = difference(judged[name], judged[before])
    folder = out / name / "eval" / f"words-{split}"
    make_folder(folder)
    write_json(folder / "eval.json", evaluation)


def report(test: Mapping[str, Judged], heldout: Mapping[str, Judged]) -> dict[str, Any]:
    """What summary.json says of instruction tuning and of reinforcement learning: before, after, and how surely."""
    base, tuned, reinforced = (test[model].first("strict") for model in MODELS)
    change = paired(reinforced, tuned)
    well = [place for place, right in enumerate(reinforced) if right and is_worked(test["grpo"].attempts[place])]
    shown = [place for place in well if not tuned[place]][:SHOWN]
    return {
        "sft": before_and_after(base, tuned),
        "grpo": before_and_after(tuned, reinforced)
        | {"difference": change.difference, "difference_interval": [change.low, change.high], "p": change.p},
        "new_stories": before_and_after(heldout["sft"].first("strict"), heldout["grpo"].first("strict")),
        "solved_now": [
            {"question": test["grpo"].attempts[place].problem.question}
            | {model: test[model].attempts[place].replies[0] for model in MODELS[1:]}
            for place in shown
        ],
        "ask": test["grpo"].attempts[well[0]].problem.question if well else None,
    }


def is_worked(attempt: Attempt) -> bool:
    """Whether the first reply is the worked solution: a right number may come from wrong steps or wrong names."""
    return attempt.replies[0].strip() == attempt.problem.answer


def before_and_after(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Accuracies with their 95 % intervals."""
    summary: dict[str, Any] = {"n": len(after)}
    for name, verdicts in (("accuracy_before", before), ("accuracy_after", after)):
        score = Accuracy.of(verdicts)
        summary |= {name: score.value, f"{name}_interval": [score.low, score.high]}
    return summary


def outcome(folder: Path) -> dict[str, Any]:
    """Bits per byte before and after, and the samples of both moments."""
    first, *_, last = read_metrics(folder)
    moments = {"before": first, "after": last}
    bits = {f"val_bpb_{moment}": line["val_bpb"] for moment, line in moments.items()}
    return bits | {f"samples_{moment}": line["samples"] for moment, line in moments.items()}


def next_commands(c: Config, summary: dict[str, Any]) -> str:
    """What was reached, what the model writes and solves now, and what to type next."""
    learned, tuned, reinforced, stories = (summary[name] for name in ("pretrain", "sft", "grpo", "new_stories"))
    nanollm = "nanollm" if shutil.which("nanollm") else f"{sys.executable} -m nanollm"
    lines = ["", "The model continues a text it has never seen:"]
    for prompt, before, after in zip(PROMPTS, learned["samples_before"], learned["samples_after"], strict=True):
        lines += [f"  before  {shorten(prompt + before, WIDTH)}", f"  after   {shorten(prompt + after, WIDTH)}", ""]
    if summary["solved_now"]:
        lines.append("Problems that only its own replies taught it to solve:")
    for solved in summary["solved_now"]:
        lines += [f"  {solved['question']}"]
        lines += [f"    before  {shorten(solved['sft'], WIDTH)}", f"    after   {shorten(solved['grpo'], WIDTH)}", ""]
    lines += [
        f"Bits per byte of unseen text: {learned['val_bpb_before']:.2f} before pretraining, "
        f"{learned['val_bpb_after']:.2f} after.",
        f"New two-step problems solved, of {reinforced['n']}: {_percent(tuned, 'before')} after pretraining, "
        f"{_percent(tuned, 'after')} after worked solutions, {_percent(reinforced, 'after')} after its own replies",
        f"(difference {reinforced['difference']:+.1%}, p = {reinforced['p']:.1g}). Of stories it never met: "
        f"{_percent(stories, 'before')}, then {_percent(stories, 'after')}.",
        f"All in {duration(sum(summary['seconds'].values()))}.",
        f"Look: {', '.join(str(c.out / name / PAGE) for name in MODELS)}",
        f'Next:  {nanollm} generate {c.out / "pretrain" / "bundle"} --prompt "The function returns"',
        f"       {nanollm} chat {c.out / 'grpo' / 'bundle'}      and ask it: {summary['ask'] or QUESTION}",
        f"       {nanollm} serve {c.out / 'grpo' / 'bundle'}     and ask it in the browser",
        f"       {nanollm} eval {c.out / 'grpo' / 'bundle'} --against {c.out / 'sft' / 'bundle'} "
        f"--task.name words --task.levels 2 --task.largest {LARGEST}",
        "       and the road to the 327M model in README.md",
    ]
    return "\n".join(lines)


QUESTION = "Tom has 5 cups. Rosa has 3 times as many cups as Tom. How many cups do they have together?"


def _percent(scores: dict[str, Any], moment: str) -> str:
    low, high = scores[f"accuracy_{moment}_interval"]
    return f"{scores[f'accuracy_{moment}']:.1%} ({low:.0%} to {high:.0%})"
