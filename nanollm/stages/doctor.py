"""Is everything well on this machine? Checks, advice where something is wrong, and a run of seconds."""

import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file
from torch import Tensor

from nanollm import __version__, compiled, machine
from nanollm.bundle import Bundle, load_bundle
from nanollm.durable import sha256_of, write_file
from nanollm.generate import native
from nanollm.generate.engine import Engine
from nanollm.generate.request import Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.work import Kernels
from nanollm.machine import Finding
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.progress import say, set_quiet
from nanollm.settings import load_preset
from nanollm.sources import builtin
from nanollm.stages import preprocess, pretrain, tokenizer
from nanollm.text import words
from nanollm.train.checkpoint import WEIGHTS, checkpoints
from nanollm.train.memory import training_memory
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from nanollm.train.run import TrainConfig
from nanollm.train.speed import SpeedConfig
from nanollm.world import World

COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
REPORT = "add the output of nanollm doctor --json to your report"
DOCUMENTS, PIECES, STEPS, STOP_AT, REPLY_TOKENS = 40, 512, 30, 20, 32
LIMIT_S = 20.0
ROUGHLY = 0.05  # between losses in float32 and in a half type
GREEDY = SamplingConfig(temperature=0)
CLOSE = 1e-3  # between log-probabilities in float32 that were summed in another order


@dataclass(frozen=True, kw_only=True)
class Config:
    """Check this machine, line by line, with advice where something is wrong; at last train and ask a tiny model.

    Exit code 1 if a line says FAIL. Warnings are no failures.
    """

    dir: Path = Path()
    """Folder whose disk is checked, and where the self-test runs (it leaves nothing behind)."""
    offline: bool = False
    """Do not ask the hub; HF_HUB_OFFLINE=1 means the same."""
    json: bool = False
    """Print one JSON object instead of lines."""


def run(c: Config) -> None:
    """Print what is found, as it is found; SystemExit, which is exit code 1, if something does not work."""
    if not c.dir.is_dir():
        raise ValueError(f"{c.dir} is not a folder; make it, or choose another --dir")
    findings = []
    for finding in examine(c):
        findings.append(finding)
        if not c.json:
            show(finding)
    failed = [finding.name for finding in findings if finding.level == "FAIL"]
    if c.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    if failed:
        sys.stdout.flush()
        raise SystemExit(f"nanollm doctor: {len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def show(finding: Finding) -> None:
    """`level  name  text`, and the advice below."""
    console = Console(highlight=False)  # looks for a terminal, NO_COLOR and the like
    line = Text.assemble((f"{finding.level:<6}", COLOURS[finding.level]), f"{finding.name:<12}{finding.text}")
    console.print(line, soft_wrap=True)
    if finding.advice:
        console.print(Text(f"{'':18}advice: {finding.advice}"), soft_wrap=True)


def examine(c: Config) -> Iterator[Finding]:
    """One finding after the other; a check that breaks is one as well."""
    checks: dict[str, Callable[[], Finding | None]] = {
        "python": lambda: machine.judge_python(sys.version_info[:3]),
        "nanollm": lambda: Finding("nanollm", "ok", f"{__version__} on {platform.platform()}"),
        "torch": check_torch,
        "device": check_device,
        "gpu": check_gpus,
        "threads": check_threads,
        "memory": check_memory,
        "packages": lambda: machine.judge_packages(machine.installed_needs()),
        "compiler": check_compiler,
        "open files": check_open_files,
        "hub": partial(check_hub, c.offline),
    }
    yield from filter(None, (attempt(name, check) for name, check in checks.items()))
    yield from check_folder(c.dir)


def attempt(name: str, check: Callable[[], Finding | None]) -> Finding | None:
    """What a check finds; None: it does not concern this machine."""
    try:
        return check()
    except Exception as error:  # a machine that is broken may raise anything
        return Finding(name, "FAIL", f"could not be checked: {told(error)}", REPORT)


def told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- the machine ---


def check_torch() -> Finding:
    return machine.judge_torch(
        torch.__version__,
        f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}",
        is_used=torch.cuda.is_available(),
        has_gpu=machine.has_nvidia_gpu(),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"),
    )


def check_device() -> Finding:
    world = World.start()
    types = dict.fromkeys([torch.float32, torch.bfloat16, world.dtype])
    rates = {str(each).removeprefix("torch."): machine.measure_gemm(world.device, each) for each in types}
    return machine.judge_device(world.names["device"], world.names["dtype"], rates)


def check_gpus() -> Finding | None:
    if not torch.cuda.is_available():
        return None
    numbers = range(torch.cuda.device_count())
    gpus = [(torch.cuda.get_device_name(number), *torch.cuda.mem_get_info(number)) for number in numbers]
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None
    return machine.judge_gpus(gpus, shared)


def check_threads() -> Finding:
    return machine.judge_threads(
        torch.get_num_threads(),
        os.cpu_count() or 1,
        machine.usable_cores(),
        machine.cpu_quota(),
        os.environ.get("OMP_NUM_THREADS"),
    )


def check_memory() -> Finding | None:
    known = machine.memory()
    return machine.judge_memory(*known) if known else None


def check_compiler() -> Finding:
    started = time.monotonic()
    try:
        words.library()
        native.library()
        problem = ""
    except compiled.NoCompilerError as error:
        problem = str(error)
    return machine.judge_compiler(compiled.find_compiler(), problem, time.monotonic() - started)


def check_open_files() -> Finding | None:
    limit = machine.open_files_limit()
    return None if limit is None else machine.judge_open_files(limit)


def check_hub(offline: bool) -> Finding:
    if offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("hub", "ok", "not asked: this is to be offline")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return machine.judge_hub(endpoint, machine.ask_hub(endpoint))


# --- the folder, and the run in it ---


def check_folder(folder: Path) -> Iterator[Finding]:
    """What is checked by writing: in a folder of its own that is gone afterwards, however that comes."""
    free = shutil.disk_usage(folder).free
    checkpoint = checkpoint_bytes(ModelConfig(**load_preset("model", "nano-327m")))
    disk = machine.judge_disk(free, 3 * checkpoint)  # two are kept while the next is written
    yield disk
    if disk.level == "FAIL":
        return  # the rest would fail for the same reason, less clearly
    try:
        room = tempfile.TemporaryDirectory(prefix=".nanollm-doctor-", dir=folder)
    except OSError as error:
        yield Finding("writing", "FAIL", f"{folder} cannot be written: {error.strerror}", "choose another --dir")
        return
    with room as name:
        here = Path(name)
        checks: dict[str, Callable[[], Finding]] = {
            "writing": lambda: machine.judge_writing(*machine.measure_writing(here, 256_000_000), checkpoint),
            "files": lambda: machine.judge_files(machine.try_files(here)),
            "clock": lambda: machine.judge_clock(*machine.read_clocks(here)),
            "self-test": lambda: self_test(here / "self-test"),
        }
        yield from filter(None, (attempt(name, check) for name, check in checks.items()))


def checkpoint_bytes(model: ModelConfig) -> int:
    """What one takes on the disk where Muon trains, as in our shipped runs."""
    remembered = training_memory(model, sequences=1, compute_bytes=4, optimizer="muon").optimizer
    return 4 * model.total_parameters + remembered


class Wrong(Exception):
    """What the self-test did is not what it should be."""


def self_test(folder: Path) -> Finding:
    """Text becomes tokens, a model learns them, is stopped, goes on, and is asked; each step has a name."""
    say(f"self-test: a small run, at most about {LIMIT_S:.0f} s ...")
    started, left, told_so_far = time.monotonic(), steps(folder), list[str]()
    set_quiet(True)
    try:
        while left and time.monotonic() - started < LIMIT_S:
            name = next(iter(left))
            try:
                told_so_far.append(left.pop(name)())
            except Exception as error:  # whatever is broken here is what the user wants to know
                reason = str(error) if isinstance(error, Wrong) else told(error)
                return Finding("self-test", "FAIL", f"{name}: {reason}", REPORT)
    finally:
        set_quiet(False)
    return judge_self_test(time.monotonic() - started, list(filter(None, told_so_far)), list(left))


def judge_self_test(seconds: float, done: list[str], left: list[str]) -> Finding:
    """done: what the steps say of themselves; left: the steps that there was no time for."""
    said = f"{seconds:.1f} s: {', '.join(done)}"
    if seconds > LIMIT_S:
        said += f"; not tried: {', '.join(left)}" if left else ""
        advice = f"on two cores it takes under {LIMIT_S:.0f} s: is the machine busy, or its disk slow?"
        return Finding("self-test", "warn", said, advice)
    return Finding("self-test", "ok", said)


def steps(folder: Path) -> dict[str, Callable[[], str]]:
    """The self-test, by the stages that users call."""
    corpus, training = folder / "corpus.jsonl", training_config(folder)
    bundle = training.out / "bundle"
    learn = tokenizer.Config(corpus=[str(corpus)], output_dir=folder, vocab_size=PIECES, held_out=0.0)
    encode = preprocess.Config(
        kind="text", input=[corpus], tokenizer_path=learn.model_path, save_dir=training.data, val_fraction=0.1
    )
    return {
        "the tokenizer": lambda: make_tokenizer(corpus, learn),
        "the token files": lambda: make_token_files(encode),
        "training": lambda: train(training),
        "going on after a stop": lambda: go_on(training),
        "the bundle": lambda: reopen(training.out),
        "a reply": lambda: reply(bundle),
        "the compute type": lambda: round_off(bundle, corpus),
        "compiled code": lambda: ask_compiled(bundle, corpus),
    }


def training_config(folder: Path) -> pretrain.Config:
    shape = ModelConfig(**load_preset("model", "nano-1m"))
    return pretrain.Config(
        model=dataclasses.replace(shape, vocab_size=PIECES, context_length=128, n_blocks=2, moe_every=2),
        tokenizer_path=folder,
        data=folder / "tokens",
        out=folder / "run",
        train=TrainConfig(steps=STEPS, batch_size=8, micro_batch_size=4, log_every=1, save_every=STOP_AT),
        optim=OptimConfig(lr=1e-2, warmup_steps=3),
        speed=SpeedConfig(compile="off"),  # compiling takes longer than all the rest
        validation_windows=4,
        sample_prompts=[],
    )


def make_tokenizer(corpus: Path, c: tokenizer.Config) -> str:
    corpus.parent.mkdir()
    lines = [json.dumps({"text": text}) for text in islice(builtin.documents(), DOCUMENTS)]
    write_file(corpus, "\n".join(lines).encode())
    tokenizer.run(c)  # refuses to make one that loses text
    return ""


def make_token_files(c: preprocess.Config) -> str:
    preprocess.run(c)
    return ""


@contextmanager
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from more, and crawls where threads wait for cores that they do not get."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(c: pretrain.Config) -> str:
    pretrain.run(c)
    losses = [line["loss"] for line in read_metrics(c.out) if "loss" in line]
    if not losses[-1] < losses[0] - 0.5:
        raise Wrong(f"the loss was {losses[0]:.2f} in the first step and {losses[-1]:.2f} in step {len(losses)}")
    return f"loss {losses[0]:.1f} to {losses[-1]:.1f}"


@one_thread()
def go_on(c: pretrain.Config) -> str:
    """Take back what came after the checkpoint in the middle, and let the same command make it again."""
    whole = sha256_of(c.out / "bundle" / "model.safetensors")
    shutil.rmtree(checkpoints(c.out / "checkpoints")[0])
    shutil.rmtree(c.out / "bundle")
    pretrain.run(c)
    if sha256_of(c.out / "bundle" / "model.safetensors") != whole:
        raise Wrong("the run that went on from a checkpoint has other weights than the one that was not stopped")
    return "resumed to the same bits"


def reopen(run: Path) -> str:
    opened = load_bundle(run / "bundle").model.state_dict()
    kept = load_file(checkpoints(run / "checkpoints")[0] / WEIGHTS)
    if opened.keys() != kept.keys() or not all(torch.equal(opened[name], kept[name]) for name in kept):
        raise Wrong("it holds other weights than the last checkpoint")
    return "bundle loaded as saved"


def reply(folder: Path) -> str:
    """Token by token with the cache (latents absorbed), and the same tokens in one pass (latents expanded)."""
    bundle = load_bundle(folder, torch.float32, World.start().device)
    if (gap := gap_to_one_pass(bundle, "torch")) > CLOSE:
        raise Wrong(f"with the cache, log-probabilities differ by {gap:.3g} from those of one pass over all tokens")
    return "reply with cache = one pass"


def gap_to_one_pass(bundle: Bundle, kernels: Kernels) -> float:
    """The largest difference between the log-probabilities of a reply's tokens, as drawn and in one pass."""
    model, prompt = bundle.model, [bundle.tokenizer.bos_id, *bundle.tokenizer.encode("The value of")]
    engine = Engine(model, rows=1, kernels=kernels)
    completion = engine.submit(Request(prompt=prompt, max_tokens=REPLY_TOKENS, sampling=GREEDY))
    while engine.has_work:
        engine.step()
    tokens = torch.tensor([[*prompt, *completion.ids]], device=model.head.weight.device)  # (1, T)
    expected = log_probabilities(model, tokens)[len(prompt) - 1 :]
    return (torch.tensor(completion.logprobs) - expected).abs().max().item()


@torch.no_grad()
def log_probabilities(model: Transformer, tokens: Tensor) -> Tensor:
    """Of each token (1, T) but the first, after those before it: (T - 1,) on the CPU."""
    after = model(tokens[:, :-1]).float().log_softmax(-1)  # (1, T - 1, V)
    return after.gather(-1, tokens[:, 1:, None]).flatten().cpu()


def round_off(folder: Path, corpus: Path) -> str:
    """The loss of a text in the type that runs compute in, and in float32."""
    world, losses = World.start(), []
    if world.dtype == torch.float32:
        return ""
    for dtype in (torch.float32, world.dtype):
        bundle = load_bundle(folder, dtype, world.device)
        ids = bundle.tokenizer.encode(corpus.read_text("utf-8")[:2000])[: bundle.model.config.context_length]
        losses.append(-log_probabilities(bundle.model, torch.tensor([ids], device=world.device)).mean().item())
    if not abs(losses[1] - losses[0]) < ROUGHLY * losses[0]:
        raise Wrong(f"the loss of a text is {losses[1]:.3f} in {world.names['dtype']} and {losses[0]:.3f} in float32")
    return f"{world.names['dtype']} = float32"


def ask_compiled(folder: Path, corpus: Path) -> str:
    """The C++ code, where it can be compiled, beside what it stands for: SentencePiece and PyTorch."""
    try:
        words.library()
        native.library()
    except compiled.NoCompilerError:
        return ""  # check_compiler has said so
    bundle, text = load_bundle(folder), corpus.read_text("utf-8")
    plain = bundle.tokenizer.encode(text)
    bundle.tokenizer.remember_words()
    if bundle.tokenizer.encode(text) != plain:
        raise Wrong("words.cpp spells a text in another way than SentencePiece")
    if (gap := gap_to_one_pass(bundle, "native")) > CLOSE:
        raise Wrong(f"forward.cpp gives log-probabilities that differ by {gap:.3g} from PyTorch's")
    return "compiled code = PyTorch"
