"""Measures a model, with intervals, and compares it with another.

Problems of a task, solved greedily and perhaps by chance; bits per byte of any text; tasks of lm-evaluation-harness;
the same for another bundle, on the same problems; and whether the questions stand in the training text. Every reply
is saved.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanollm import __version__
from nanollm.bundle import PROVENANCE, load_bundle, read_config
from nanollm.config import check_at_least
from nanollm.data.shards import Shards
from nanollm.durable import check_writable, sha256_of, write_json
from nanollm.evals import documents, results
from nanollm.evals.bits_per_byte import Documents
from nanollm.evals.contamination import NGRAM_WORDS, search
from nanollm.evals.problems import GREEDY, ROWS, Judged, graders, judge, solve
from nanollm.evals.results import Measured, save_replies
from nanollm.evals.stats import Figures
from nanollm.extras import require
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.tools import tool_caller, with_tools
from nanollm.progress import say
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import Task, TaskConfig, default_of, environments_of, open_task
from nanollm.text.tokenizer import Tokenizer
from nanollm.world import DeviceName, DtypeName, World

if TYPE_CHECKING:
    from nanollm.evals.benchmarks import Ask

POSITIONAL = ("bundle",)
NO_TASK = "none"
ASK = (
    "nothing to measure; ask for --task.name words (or gsm8k, or module:Name of your own), --text FILE_OR_FOLDER, "
    "--harness hellaswag (or another task of lm-evaluation-harness) or --data TOKEN_FOLDER"
)


@dataclass(frozen=True, kw_only=True)
class EvalTask(TaskConfig):
    """Which problems, if any."""

    name: str = NO_TASK
    """words: generated math word problems; gsm8k: GSM8K; module:Name: a class of your own; none: no problems."""
    split: str = "test"
    """Which problems of the task: train or test, and for words new_numbers or heldout."""

    def __post_init__(self) -> None:
        if self.name != NO_TASK:
            super().__post_init__()
        elif any(getattr(self, option.name) != default_of(option) for option in dataclasses.fields(self)):
            raise ValueError("--task.name is missing; the other --task options need it")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure a model: problems solved, with a 95 % interval, bits per byte, and against another model.

    Ask for --task.name, --text, --data or --harness, in one call for several. Figures go to eval.json, every reply to
    samples.jsonl and harness-TASK.jsonl, all in --out.
    """

    bundle: Path
    """Folder of a bundle, such as runs/demo/pretrain/bundle."""
    task: EvalTask = field(default_factory=EvalTask)
    """Problems to solve."""
    n: int = 500
    """Number of problems: the first of the split, or all if it has fewer."""
    max_tokens: int = 256
    """Maximum length of a reply, in tokens."""
    samples: int = 0
    """Sampled replies to each problem, in addition to the greedy one, for pass@k (0: none)."""
    k: list[int] = field(default_factory=list)
    """The k of pass@k, each at most --samples; default: 1 and --samples."""
    temperature: float = 1.0
    """Sampling temperature of --samples."""
    top_p: float = 1.0
    """Nucleus sampling of --samples: choose among the most likely tokens that together reach this probability."""
    tools: list[str] | None = None
    """Tools that the model may call while it replies, such as calculator. null: those each model was trained with;
    none: no tools."""
    against: Path | None = None
    """Another bundle to measure on the same problems and texts, with its own tokenizer."""
    text: list[Path] = field(default_factory=list)
    """Files or folders (.txt, .jsonl, .csv, .parquet, each also .gz or .zst) whose bits per byte are measured."""
    text_column: str = "text"
    """Column (.jsonl key) that holds the text, for --text and --contamination."""
    data: Path | None = None
    """Folder of token files whose val split is measured in bits per byte; for conversations, the assistant's messages
    only."""
    harness: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, such as hellaswag,arc_easy, or suites of them: core, small, or FILE.yaml."""
    harness_tasks: Path | None = None
    """Folder with the YAML files of your own tasks for --harness."""
    harness_limit: int | None = None
    """Documents of each task of --harness, the first ones; null: all."""
    harness_shots: int | None = None
    """Examples before each question of --harness; null: as the task or the suite says."""
    contamination: list[Path] = field(default_factory=list)
    """Training text to search for the questions: files, folders, or folders of token files."""
    ngram: int = NGRAM_WORDS
    """Words in an n-gram that counts as copied, for --contamination."""
    rows: int = ROWS
    """Batch size of replies and texts; smaller needs less memory."""
    seed: int = 0
    """Seed of --samples."""
    out: Path | None = None
    """Folder for eval.json and samples.jsonl, which are overwritten; null: eval/TASK-SPLIT beside the bundle."""
    json: bool = False
    """Print eval.json as one line."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""

    def __post_init__(self) -> None:
        _ = self.sampling  # which checks it
        if not (self.has_task or self.text or self.data or self.harness_names):
            raise ValueError(ASK)
        check_at_least(1, self, "n", "max_tokens", "rows", "ngram", "harness_limit", prefix="--")
        check_at_least(0, self, "samples", "harness_shots", prefix="--")
        if not self.harness_names and (self.harness_tasks, self.harness_limit, self.harness_shots) != (None,) * 3:
            raise ValueError("--harness_tasks, --harness_limit and --harness_shots need --harness, such as hellaswag")
        if odd := [k for k in self.k if not 1 <= k <= self.samples]:
            raise ValueError(f"--k must be from 1 to --samples {self.samples}, got {odd[0]}")
        if not self.has_task and (self.samples or self.contamination):
            raise ValueError("--samples and --contamination need problems; choose some with --task.name")

    @property
    def has_task(self) -> bool:
        return self.task.name != NO_TASK

    @property
    def harness_names(self) -> list[str]:
        """The tasks of --harness one by one."""
        return [name for word in self.harness for name in word.split(",") if name]

    @property
    def sampling(self) -> SamplingConfig:
        """Seed of --samples."""
        return SamplingConfig(temperature=self.temperature, top_p=self.top_p)

    @property
    def tries(self) -> list[int]:
        """The k of pass@k."""
        return sorted(set(self.k or [1, self.samples])) if self.samples else []

    @property
    def folder(self) -> Path:
        """Where the files go."""
        names = [f"{self.task.name}-{self.task.split}"] if self.has_task else self.harness_names
        name = "-".join(names)[:100] or "text"
        beside = Path(os.path.normpath(self.bundle / "..")) / "eval"
        return self.out or beside / re.sub(r"[^\w.-]+", "-", name)


Inputs = tuple[Task | None, list[Problem], "Ask | None"]
"""What every bundle is asked."""


def plan(c: Config) -> str:
    """What would be measured."""
    _, problems, ask = open_inputs(c)
    n = len(problems)
    parts = [f"{n:,} problems of {c.task.name} {c.task.split}, {n * (1 + c.samples):,} replies"] if n else []
    parts += [f"bits per byte of {path}" for path in [*c.text, *([c.data] if c.data else [])]]
    if ask:
        parts.append(f"lm-evaluation-harness: {', '.join(c.harness_names)}")
    parts += [f"the same for {c.against}"] if c.against else []
    parts += [f"{c.ngram}-grams of the questions in {path}" for path in c.contamination]
    return "; ".join([*parts, f"into {c.folder}"])


def run(c: Config) -> str:
    """Measure, write the files, and return what to print."""
    began = time.monotonic()
    world = World.start(c.device, c.dtype)
    inputs = open_inputs(c)
    baseline = other(c)
    check_writable(c.folder, "--out")
    measured = {"bundle": measure(c, inputs, world)}
    save_replies(c.folder, measured)  # already now: what follows may take long
    if baseline:
        measured["against"] = measure(baseline, inputs, world)
        save_replies(c.folder, measured)
    evaluation: Figures = {name: each.figures for name, each in measured.items()}
    if baseline:
        evaluation |= measured["bundle"].minus(measured["against"])
    if c.contamination:
        evaluation["contamination"] = look_for_copies(c, inputs[1], measured["bundle"].replies["greedy"])
    evaluation["settings"] = json.loads(json.dumps(asdict(c) | world.names, default=str))
    evaluation["made_by"] = f"nanollm {__version__} eval, torch {torch.__version__}"
    evaluation |= seconds_since(began)
    write_json(c.folder / "eval.json", evaluation)
    say(f"written to {c.folder}")
    return json.dumps(evaluation) if c.json else "\n".join(results.lines(evaluation))


def open_inputs(c: Config) -> Inputs:
    """What is asked. What is missing or does not fit is found here, before anything is computed."""
    read_config(c.bundle)
    tokenizer = Tokenizer.load(c.bundle)
    if c.against:
        read_config(c.against)
    for path in c.text:
        if documents.is_prepared(path):
            raise ValueError(f"{path} is a folder of token files; measure it with --data {path}")
        documents.check(path, tokenizer)
    for path in c.contamination:
        documents.check(path, tokenizer)
    if c.data:
        Shards.open(c.data, "val", tokenizer_fingerprint=tokenizer.fingerprint, verify="size")  # every byte, later
    ask = open_harness(c) if c.harness_names else None
    if not c.has_task:
        return None, [], ask
    task = open_task(c.task)
    found = task.problems(c.task.split)
    if len(found) < c.n:
        say(f"{c.task.name} {c.task.split} has {len(found):,} problems, fewer than --n {c.n:,}; using all of them")
    return task, [found[place] for place in range(min(c.n, len(found)))], ask


def open_harness(c: Config) -> "Ask":
    """The tasks of --harness."""
    require("--harness", ["lm_eval"], "eval")
    from nanollm.evals.benchmarks import open_benchmarks  # late: it takes seconds, and is an extra

    return open_benchmarks(c.harness_names, c.harness_tasks, c.harness_limit, c.harness_shots)


def other(c: Config) -> Config | None:
    """What is measured of --against, if there is one: the same, but nothing by chance."""
    if c.against is None:
        return None
    data = c.data
    if data and Tokenizer.load(c.bundle).fingerprint != Tokenizer.load(c.against).fingerprint:
        why = f"{data} holds the ids of another tokenizer than {c.against}'s"
        if not (c.has_task or c.text or c.harness_names):
            raise ValueError(f"{why}; compare them on --text FILE_OR_FOLDER")
        say(f"{why}, so it is measured on the rest only")
        data = None
    return replace(c, bundle=c.against, against=None, data=data, samples=0, k=[])


def measure(c: Config, inputs: Inputs, world: World) -> Measured:
    """Everything that is asked of one bundle."""
    task, problems, ask = inputs
    bundle = with_tools(load_bundle(c.bundle, world.dtype, world.device), c.tools)
    found: Figures = {"path": str(c.bundle), "digest": sha256_of(c.bundle / PROVENANCE)}
    replies: dict[str, Judged] = {}
    tool, environment = tool_caller(bundle), environments_of(task) if task else None
    ask_model = partial(solve, bundle.model, bundle.tokenizer, problems, tool=tool, environment=environment)
    attempt = partial(ask_model, seed=c.seed, rows=c.rows)
    if task is not None:
        began = time.monotonic()
        replies["greedy"] = judge(attempt(GREEDY, max_tokens=c.max_tokens), graders(task))
        found["greedy"] = results.greedy_figures(replies["greedy"]) | seconds_since(began)
    if task is not None and c.samples:
        began = time.monotonic()
        replies["samples"] = judge(attempt(c.sampling, max_tokens=c.max_tokens, samples=c.samples), graders(task))
        found["samples"] = results.sample_figures(replies["samples"], c.samples, c.tries) | seconds_since(began)
    bits: dict[str, Documents] = {}
    for path in [*c.text, *([c.data] if c.data else [])]:
        began = time.monotonic()
        if path == c.data:
            bits[str(path)] = documents.bits_of_prepared(bundle, path)
        else:
            texts = (text for _, text in documents.read_all(path, c.text_column, bundle.tokenizer))
            bits[str(path)] = documents.bits_of_texts(bundle, texts)
        figures = results.bits_figures(str(path), bits[str(path)]) | seconds_since(began)
        found.setdefault("data" if path == c.data else "text", []).append(figures)
    answered = None
    if ask:
        began = time.monotonic()
        answered = ask(bundle, c.rows)
        found["harness"] = {"tasks": answered.figures, "suites": answered.suite_figures} | seconds_since(began)
    return Measured(found, replies, answered, bits)


def look_for_copies(c: Config, problems: Sequence[Problem], greedy: Judged) -> Figures:
    """Questions that stand in the training text."""
    began = time.monotonic()
    tokenizer = Tokenizer.load(c.bundle)
    training = (document for path in c.contamination for document in documents.read_all(path, c.text_column, tokenizer))
    found = search([problem.question for problem in problems], training, c.ngram)
    return results.contamination_figures(found, greedy) | seconds_since(began)


def seconds_since(began: float) -> Figures:
    return {"seconds": round(time.monotonic() - began, 3)}
