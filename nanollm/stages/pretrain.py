"""Token files become a base model."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nanollm.config import check_at_least, load_preset, preset_names, read_mapping
from nanollm.data.batches import Documents, Fetcher, TextShards, Windows
from nanollm.data.order import Mixture, sources_of
from nanollm.data.shards import Shards, Verification, read_manifest
from nanollm.durable import make_folder
from nanollm.evals.bits_per_byte import BitsPerByte, bits_per_byte
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.config import ModelConfig
from nanollm.model.int4 import check_widths
from nanollm.model.transformer import StartName, Transformer
from nanollm.progress import say
from nanollm.report.page import write_report
from nanollm.stages import plan as planning
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.loss import next_token_loss
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig, default_lr, lr_at
from nanollm.train.run import Run, RunConfig, TrainConfig, flat
from nanollm.train.scaling import Ladder, seconds_of, seen
from nanollm.train.state import TrainState
from nanollm.train.step import SIGMAS, train_step
from nanollm.world import World

SAMPLE_TOKENS = 48
MIN_STEPS, MEASURED_S = 20, 8
"""Of --budget: the shortest run, and how long its speed is measured."""
AUTO = ["auto"]
PROMPTS, PROMPT_WORDS, PROMPT_CHARS, PROMPT_TOKENS = 3, 4, 40, 4096
"""So many beginnings of lines, so long, from so many tokens of the text."""
UNIT_ROWS: dict[StartName, list[str]] = {"gpt2": [], "fast": ["trunk.embed.weight"]}

# What decides which numbers come out at which step; the rest (intervals, length, rates) may change on the way.
FIXED = ("model", "start", "seed", "train.batch_size", "optim.name", "inputs")

Splits = Mapping[str, TextShards]  # by folder


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Train a base model on token files; the same command resumes an interrupted run."""

    model: ModelConfig
    """The model's shape: a preset's name, a YAML file, or single values."""
    tokenizer_path: Path
    """The tokenizer the token files were written with: a .model file or its folder."""
    data: dict[str, float] | Path
    """Folder of token files, as nanollm preprocess makes it, or several with their weights, {folder: weight, ...}: a
    weight is a share of the tokens seen, whatever the sizes of the folders."""
    train: TrainConfig
    """Length, batches and intervals."""
    budget: str | None = None
    """Time to train in on this machine, such as 10m or 1h30m, which is measured first: chooses the preset, the batch,
    the steps and what goes with them, as far as they are not given."""
    scale: Path | None = None
    """A ladder on the same text, the scale.json of nanollm scale: says which loss to expect, and chooses --budget's
    preset; null: the smallest preset that sees at most 20 tokens per parameter."""
    anneal: dict[float, dict[str, float]] = field(default_factory=dict)
    """Other mixtures from a fraction of the run on, {fraction: {folder: weight, ...}, ...}: {0.8: {data/books: 1}}
    reads books alone in the last fifth."""
    documents: Documents = "across"
    """across: rows are windows of the running text. apart: documents are packed into rows by best fit, those longer
    than the context in pieces, and none sees another."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(spike_sigmas=SIGMAS))
    """Optimizer and schedule."""
    start: StartName = "gpt2"
    """Initialization. gpt2: small normal weights; fast: zeros in the head and in what writes to the residual stream,
    and embedding rows kept at an RMS of 1 throughout training, which helps short runs (docs/ablations.md)."""
    validation_windows: int = 64
    """Windows on which bits per byte are measured, spread evenly over the validation split (0: all)."""
    sample_prompts: list[str] = field(default_factory=AUTO.copy)
    """Prompts that are continued during training, with seed 0. auto: beginnings of lines from the validation text, or
    from the training text if there is none; none: no samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "anneal", anneal_of(self.anneal))
        sources_of(self.data)
        if self.budget is not None:
            raise ValueError("budget: only the command line chooses by it; in Python give model and train")
        if self.sample_prompts == ["none"]:
            object.__setattr__(self, "sample_prompts", [])
        check_at_least(0, self, "validation_windows")
        if self.train.qat_fraction:
            check_widths(self.model)
        if self.optim.lr is None:
            lr = default_lr(self.optim.name, self.model.d_model, self.train.batch_size * self.model.context_length)
            object.__setattr__(self, "optim", dataclasses.replace(self.optim, lr=lr))

    @property
    def weights(self) -> dict[float, dict[str, float]]:
        """Folder to weight, by the fraction of the run from which they hold, in order."""
        return {0.0: sources_of(self.data)} | self.anneal

    @property
    def folders(self) -> list[str]:
        return sorted({folder for weights in self.weights.values() for folder in weights})


def anneal_of(given: Mapping[float, dict[str, float]]) -> dict[float, dict[str, float]]:
    """The same in the order of the fractions, which the command line gives as text."""
    for fraction in given:
        if not re.fullmatch(r"0?\.\d+", str(fraction)) or not float(fraction):
            raise ValueError(f"anneal: expected fractions of the run above 0 and below 1, got {fraction}")
    if len({float(fraction) for fraction in given}) < len(given):
        raise ValueError(f"anneal: expected each fraction once, got {', '.join(map(str, given))}")
    ordered = sorted((float(fraction), weights) for fraction, weights in given.items())
    return {fraction: sources_of(weights, f"anneal.{fraction}") for fraction, weights in ordered}


# --- what a budget of time chooses ---


def within(budget: str, given: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Config]) -> dict[str, Any]:
    """Options for a run that ends in time on this machine.

    `parse` makes the Config of these and of the given ones, which win.
    """
    began, seconds, names = time.monotonic(), seconds_of(budget), flat(given)
    if "train.steps" in names:
        raise ValueError("--budget chooses the number of steps; leave out --train.steps, or --budget")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--budget is for one process; give several --train.steps, which nanollm plan computes")
    micro = names.get("train.micro_batch_size", "1")
    base = {"train.steps": "1", "train.batch_size": micro, "train.micro_batch_size": micro}
    presets = [load_preset("model", name) for name in preset_names("model")]
    c = parse({"model": presets[0], **base})
    if (c.out / "config.yaml").exists():
        say(f"{c.out} was begun before: what was chosen then holds")
        return read_mapping(c.out / "config.yaml")
    vocab_size = Tokenizer.load(c.tokenizer_path).vocab_size
    text = sum(read_manifest(Path(folder))[0]["splits"]["train"]["tokens"] for folder in c.folders)
    machine = planning.this_machine(c.device == "cpu")
    ladder = Ladder.read(c.scale) if c.scale else None
    fitting = []
    for preset in presets:
        model = {"model": preset | {"vocab_size": vocab_size}}
        if ladder:
            model["model"]["context_length"] = ladder.shape["context_length"]
        m = parse({**model, **base}).model
        if rate := planning.tokens_per_s(m, machine):
            tokens = rate * seconds
            if ladder:
                worth = ladder.law.value(m.multiplied_parameters, seen(tokens, ladder.text_tokens))
            else:  # the first one with enough parameters, or the largest
                worth = max(0.0, tokens / m.total_parameters - planning.TOKENS_PER_PARAMETER)
            fitting.append((worth, rate, model, m))
    if not fitting:
        raise ValueError(planning.nothing_fits(m, machine, 1, 1, "the model"))
    _, rate, model, m = min(fitting, key=lambda each: each[0])

    def options(tokens: float) -> dict[str, Any]:
        rows = c.train.batch_size if "train.batch_size" in names else planning.good_batch_size(m, tokens)
        rows = -(-rows // c.train.micro_batch_size) * c.train.micro_batch_size
        chosen = planning.recipe(m, machine, rows, tokens)
        return model | chosen | {"train.validate_every": max(1, chosen["train.steps"] // 4)}

    say(f"measuring how fast {m.total_parameters:,} parameters train here")
    rate, rest_s = measure(parse(options(rate * seconds)), rate)
    spent = time.monotonic() - began + 2.5 * rest_s  # three more validations take less than start and end
    found = parse(chosen := options(max(1.0, rate * (0.95 * seconds - spent))))
    t, per_step = found.train, found.train.batch_size * m.context_length
    if t.steps < MIN_STEPS:
        least = (MIN_STEPS * per_step / rate + spent) / 0.95
        raise ValueError(f"--budget {budget} is too small: {MIN_STEPS} steps take {math.ceil(least)}s here")
    tokens = t.steps * per_step
    say(
        f"{budget}: {m.total_parameters:,} parameters, {t.steps:,} steps of {t.batch_size} x {m.context_length} = "
        f"{tokens:,} tokens ({tokens / text:.2f} epochs) at {rate:,.0f} tokens/s"
    )
    return chosen


def measure(c: Config, guess: float) -> tuple[float, float]:
    """Tokens per second of a short run with these settings, and the seconds that it needs for all else.

    guess: tokens per second, to choose the length of the run by.
    """
    steps = round(MEASURED_S * guess / c.train.batch_size / c.model.context_length)
    steps = min(max(steps, 8), 60)
    began = time.monotonic()
    make_folder(c.out.parent)
    with TemporaryDirectory(dir=c.out.parent) as folder, redirect_stderr(StringIO()):
        train = dataclasses.replace(c.train, steps=steps, log_every=steps // 4, validate_every=0)
        run(dataclasses.replace(c, out=Path(folder), train=train, trackers=[]))
        lines = read_metrics(Path(folder))
    rate = median([line["tokens_per_s"] for line in lines if "tokens_per_s" in line][1:])  # the first fills caches
    return rate, time.monotonic() - began - steps * c.train.batch_size * c.model.context_length / rate


def plan(c: Config) -> str:
    """What a run would do."""
    world = World.start(c.device, c.dtype)
    tokenizer, splits, validation = _open(c, world)
    sample_prompts(c, tokenizer, validation or splits)  # finds one that does not fit
    tokens = c.train.steps * c.train.batch_size * c.model.context_length
    lines = [
        f"{c.model.total_parameters:,} parameters on {world.device} in {world.names['dtype']}, "
        f"tokenizer {tokenizer.fingerprint[:6]}, {c.train.steps:,} steps x {c.train.batch_size} x "
        f"{c.model.context_length} = {tokens:,} tokens, learning rate {c.optim.lr:g}",
        *describe(c, splits),
    ]
    return "\n".join(lines)


def run(c: Config) -> Path:
    """Train, and return the folder of the bundle."""
    with World.join(c.device, c.dtype, c.parallel) as world:
        tokenizer, splits, validation = _open(c, world)
        c = dataclasses.replace(c, sample_prompts=sample_prompts(c, tokenizer, validation or splits))
        windows = Windows([*splits.values()], mixture_of(c), c.seed)
        windows.check(c.train.batch_size, c.train.micro_batch_size, world.size)

        def make_state() -> TrainState:
            model = Transformer(c.model).init(c.seed, c.start).to(world.device)
            return TrainState.start(model, c.optim, world, UNIT_ROWS[c.start], c.train.int4_from)

        fingerprints = {folder: split.shards.fingerprint for folder, split in splits.items()}
        is_mixed = len(splits) > 1
        inputs: dict[str, object] = {
            "data": fingerprints if is_mixed else fingerprints[c.folders[0]],
            "tokenizer": tokenizer.fingerprint,
        }
        if c.documents == "apart":  # not "across", so that runs from before there was a choice resume
            inputs["documents"] = c.documents
        # The only folder may move; the fractions of `anneal` are those of this many steps.
        fixed = (*FIXED, *(["data", "anneal"] if is_mixed else []), *(["train.steps"] if c.anneal else []))
        with Run.open(c, c.train, world, inputs=inputs, fixed=fixed, make_state=make_state) as run:
            state = run.state
            for line in describe(c, splits):
                say(line)
            loss_of = partial(
                next_token_loss,
                balance_weight=c.optim.balance_weight,
                recompute=c.speed.recompute,
                is_compiled=run.is_compiled,
            )
            if run.is_new:
                run.log(validate(c, state, tokenizer, validation, world))
                run.log(sample(c, state, tokenizer, world))
            fetch = Fetcher(windows, c.train.batch_size, c.train.micro_batch_size, world)
            for step in run.steps():
                stats = train_step(state, fetch(step), loss_of, lr_at(step, c.train.steps, c.optim), c.optim, world)
                run.record(stats, windows.names(step, c.train.batch_size))
                if run.due(c.train.validate_every):
                    run.log(validate(c, state, tokenizer, validation, world))
                if run.due(c.train.sample_every):
                    run.log(sample(c, state, tokenizer, world))
            rows = windows.mixture.drawn(state.step * c.train.batch_size).tolist()  # of each split
            filled = sum(count * split.fill for count, split in zip(rows, windows.splits, strict=True))
            tokens_seen = round(filled * c.model.context_length)
            folder = run.save_bundle("pretrain", c.model, tokenizer, tokens_seen=tokens_seen)
            write_report(c.out, world)
            return folder


def mixture_of(c: Config) -> Mixture:
    """Of the folders in the order of their names; the weights of `anneal` come into force between two steps."""
    mixture = None
    for fraction, weights in c.weights.items():
        begins = round(fraction * c.train.steps) * c.train.batch_size
        mixture = Mixture([weights.get(folder, 0.0) for folder in c.folders], after=mixture, begins=begins)
    assert mixture is not None
    return mixture


def describe(c: Config, splits: Splits) -> list[str]:
    """What will be seen of each folder, and which loss to expect."""
    rows = c.train.steps * c.train.batch_size
    lines = []
    if c.scale:
        expected = planning.loss_facts(Ladder.read(c.scale), c.model, rows * c.model.context_length)
        lines.append(f"loss to expect: {planning.told(expected)}")
    for (folder, split), drawn in zip(splits.items(), mixture_of(c).drawn(rows).tolist(), strict=True):
        line = f"{folder}: {drawn / rows:.1%} of the rows seen, {drawn / len(split):.2f} epochs of its {len(split):,}"
        lines.append(line + (f", which are {split.fill:.1%} full" if split.is_packed else ""))
    return lines


def validate(c: Config, state: TrainState, tokenizer: Tokenizer, splits: Splits, world: World) -> dict[str, object]:
    """Bits per byte, and loss per token, of some rows of each validation split, and of all of them together."""
    if not splits:
        return {}
    scores, model = dict[str, BitsPerByte](), state.whole_model()
    for folder, split in splits.items():
        batches = split.batches(c.train.micro_batch_size, c.validation_windows or None)
        scores[folder] = bits_per_byte(model, batches, tokenizer.token_bytes, world)
    nats, n_bytes, tokens = (sum(column) for column in zip(*map(dataclasses.astuple, scores.values()), strict=True))
    score = BitsPerByte(nats, n_bytes, tokens)
    say(f"step {state.step:,}: validation {score.value:.4f} bits per byte")
    by_folder = {f"val_bpb/{folder}": each.value for folder, each in scores.items()} if len(scores) > 1 else {}
    return {"val_bpb": score.value, "val_loss": score.nats / score.tokens, **by_folder}


def sample_prompts(c: Config, tokenizer: Tokenizer, splits: Splits) -> list[str]:
    """The prompts that were given, or those that the first folder's text gives; each leaves room in the context."""

    def fits(prompt: str) -> bool:
        return len(tokenizer.encode(prompt)) + 1 < c.model.context_length

    if c.sample_prompts != AUTO:
        if too_long := [prompt for prompt in c.sample_prompts if not fits(prompt)]:
            raise ValueError(
                f"sample prompt {too_long[0][:40]!r} does not fit the context of {c.model.context_length} tokens"
            )
        return c.sample_prompts
    shards = next(iter(splits.values())).shards
    ids = shards.read(0, min(PROMPT_TOKENS, shards.tokens_total))
    documents = np.split(ids, np.flatnonzero(tokenizer.token_bytes[ids] == 0))  # at their marks
    lines = [line.split() for document in documents for line in tokenizer.decode(document).splitlines()]
    begun = dict.fromkeys(" ".join(words[:PROMPT_WORDS])[:PROMPT_CHARS] for words in lines if words)
    found = [prompt for prompt in begun if fits(prompt)]
    return found[:: max(1, len(found) // PROMPTS)][:PROMPTS]


def sample(c: Config, state: TrainState, tokenizer: Tokenizer, world: World) -> dict[str, object]:
    """A short continuation of each sample prompt, always drawn with the same seeds; on the main rank."""
    if not c.sample_prompts:
        return {}
    model = state.whole_model()
    if not world.is_main:
        return {}
    completions = generate(
        model,
        [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in c.sample_prompts],
        SamplingConfig(temperature=0.8, top_k=50),
        max_tokens=SAMPLE_TOKENS,
        stop_token_ids=frozenset({tokenizer.eos_id}),
    )
    texts = [tokenizer.decode_drawn(completion.ids) for completion in completions]
    for prompt, text in zip(c.sample_prompts, texts, strict=True):
        say(f"step {state.step:,}: {(prompt + text)!r}")
    return {"samples": texts}


def _open(c: Config, world: World) -> tuple[Tokenizer, Splits, Splits]:
    """Tokenizer, training splits, and those validation splits that have any text, each held to the others."""
    tokenizer = Tokenizer.load(c.tokenizer_path)
    if tokenizer.vocab_size > c.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} pieces, model.vocab_size is {c.model.vocab_size:,}; "
            f"set --model.vocab_size {tokenizer.vocab_size} or train a smaller tokenizer"
        )
    train, validation = dict[str, TextShards](), dict[str, TextShards]()
    for folder in c.folders:
        train[folder] = _open_split(c, folder, tokenizer, "train", world)
        if read_manifest(Path(folder))[0]["splits"].get("val", {}).get("tokens"):
            validation[folder] = _open_split(c, folder, tokenizer, "val", world)
        else:
            say(
                f"{folder} has no validation text: nothing will be measured on it (nanollm preprocess --val_input FILE)"
            )
    return tokenizer, train, validation


def _open_split(c: Config, folder: str, tokenizer: Tokenizer, split: str, world: World) -> TextShards:
    verify: Verification = "sha256" if world.is_main else "size"  # all ranks read the same files
    shards = Shards.open(Path(folder), split, tokenizer_fingerprint=tokenizer.fingerprint, verify=verify)
    if shards.kind != "text":
        raise ValueError(
            f"{folder} holds conversations, of which only the replies are trained; pretraining reads documents "
            f"(nanollm preprocess owt or text)"
        )
    return TextShards(shards, c.model.context_length, c.documents)
