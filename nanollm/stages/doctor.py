"""A check of this machine: versions, device and type, cores, memory, compiler, disk, and a small run that is resumed.

A line says `ok`, `warn` (runs work, but slowly or not all of them) or `FAIL` (they do not work).
"""

import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from nanollm import __version__, hardware
from nanollm.bundle import load_bundle
from nanollm.config import load_preset
from nanollm.durable import sha256_of, write_file
from nanollm.extras import how_to_install
from nanollm.generate import cpu_runner as native
from nanollm.generate.engine import Engine
from nanollm.generate.request import Kernels, Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.hardware import GB
from nanollm.kernels import build
from nanollm.model.config import ModelConfig
from nanollm.progress import say, set_quiet
from nanollm.sources import builtin
from nanollm.stages import preprocess, pretrain, tokenizer
from nanollm.text import words
from nanollm.train.checkpoint import checkpoints
from nanollm.train.compile import SpeedConfig
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from nanollm.train.run import TrainConfig
from nanollm.world import World

REPORT = "add the output of nanollm doctor --json to your report"
EXTRAS = {"data": "datasets", "serve": "fastapi", "eval": "lm_eval", "export": "transformers"}
"""A module that an extra brings."""
DOCUMENTS, PIECES, STEPS, STOP_AT, REPLY_TOKENS = 40, 512, 30, 20, 32
USUAL_S = 20.0
"""The small run takes less on two idle cores."""
MAX_DIFFERENCE = 1e-3
"""Between log-probabilities in float32 that were summed in another order."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    level: Literal["ok", "warn", "FAIL"]
    text: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Check this machine and say what to change; then train a tiny model, resume it and let it reply.

    Exit code 1 if a line says FAIL. Warnings are no failures.
    """

    dir: Path = Path()
    """Folder whose disk is checked and where the test run is written; it is deleted afterwards."""
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
            advice = f"\n{'':18}advice: {finding.advice}" if finding.advice else ""
            print(f"{finding.level:<6}{finding.name:<12}{finding.text}{advice}", flush=True)
    failed = [finding.name for finding in findings if finding.level == "FAIL"]
    if c.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    if failed:
        sys.stdout.flush()
        raise SystemExit(f"nanollm doctor: {len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def examine(c: Config) -> Iterator[Finding]:
    """One finding after the other. A check returns what it found, and advice if there is some; it FAILs by raising."""
    checks: dict[str, Callable[[], tuple[str, str]]] = {
        "versions": check_versions,
        "torch": check_torch,
        "device": check_device,
        "cores": check_cores,
        "memory": check_memory,
        "compiler": check_compiler,
        "disk": lambda: check_disk(shutil.disk_usage(c.dir).free),
        "small run": lambda: small_run(c.dir),
    }
    for name, check in checks.items():
        try:
            text, advice = check()
            yield Finding(name, "warn" if advice else "ok", text, advice)
        except Exception as error:  # whatever is broken here is what the user wants to know
            yield Finding(name, "FAIL", " ".join(f"{type(error).__name__}: {error}".split())[:300], REPORT)


# --- the machine ---


def check_versions() -> tuple[str, str]:
    missing = [extra for extra, module in EXTRAS.items() if find_spec(module) is None]
    said = f"nanollm {__version__}, Python {platform.python_version()}, {platform.platform()}"
    return said + (f"; more: {how_to_install(*missing)}" if missing else ""), ""


def check_torch() -> tuple[str, str]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    said = f"{torch.__version__}, for {build or 'CPUs'}"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if torch.cuda.is_available() or is_hidden or shutil.which("nvidia-smi") is None:
        return said, ""
    return f"{said}, cannot use this machine's NVIDIA GPU", "install another build: https://pytorch.org"


def check_device() -> tuple[str, str]:
    """The device and type that runs choose by themselves, and the rate of a matrix product in each type."""
    world = World.start()
    dtype, types = world.names["dtype"], dict.fromkeys([torch.float32, torch.bfloat16, world.dtype])
    rates = {str(each).removeprefix("torch."): hardware.measure_gemm(world.device, each) for each in types}
    measured = ", ".join(f"{name} {rate:.3g} TFLOP/s" if rate else f"no {name}" for name, rate in rates.items())
    said = f"{world.names['device']} in {dtype}; {measured}"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        said += f"; {torch.cuda.get_device_name(number)} with {free / GB:.1f} of {total / GB:.1f} GB free"
    is_slower = rates[dtype] < rates["float32"]
    return said, f"take --dtype float32: {dtype} is slower here, or missing" if is_slower else ""


def check_cores() -> tuple[str, str]:
    threads, cores = torch.get_num_threads(), hardware.usable_cores()
    said = f"threads: {threads}, cores: {cores}, load: {hardware.load():.1f}"
    if threads > cores or 2 * threads < cores:
        return said, f"set OMP_NUM_THREADS={cores}"
    return said, "other programs are at work, so everything takes longer" if hardware.is_shared() else ""


def check_memory() -> tuple[str, str]:
    if (known := hardware.memory()) is None:
        return "unknown on this system", ""
    advice = "end other programs; nanollm info MODEL says what a training step takes"
    return f"{known[0] / GB:.1f} of {known[1] / GB:.1f} GB free", advice if known[0] < 2 * GB else ""


def check_compiler() -> tuple[str, str]:
    started = time.monotonic()
    try:
        words.library()
        native.library()
    except build.NoCompilerError as error:
        return "C++ cannot be compiled: replies and tokenizing are several times slower on this CPU", str(error)
    command = " ".join(build.find_compiler())
    return f"{command} made and loaded our C++ in {time.monotonic() - started:.1f} s", ""


def check_disk(free: int) -> tuple[str, str]:
    # Two are kept and a third is written, each of the float32 weights and Muon's state.
    said = f"{free / GB:,.1f} GB free; checkpoints of nano-327m take 8.8 GB"
    advice = "make room, or take another disk: --out decides where a run is kept"
    if free < 0.5 * GB:
        raise OSError(f"{said}: {advice}")
    return said, advice if free < 10 * GB else ""


# --- the small run ---


def small_run(around: Path) -> tuple[str, str]:
    """Text becomes tokens, a model learns them, is stopped, is resumed, and replies: by the stages that users call."""
    say(f"small run: about {USUAL_S:.0f} s ...")
    started, threads = time.monotonic(), torch.get_num_threads()
    set_quiet(True)
    torch.set_num_threads(1)  # a tiny model gains nothing from more, and crawls where threads wait for cores
    try:
        with tempfile.TemporaryDirectory(prefix=".nanollm-doctor-", dir=around) as name:
            c = training_config(Path(name))
            prepare(c)
            done = [train(c), resume(c), reply(c.out / "bundle", "torch")]
            done += [reply(c.out / "bundle", "native")] * native.can_draw()
    finally:
        torch.set_num_threads(threads)
        set_quiet(False)
    seconds = time.monotonic() - started
    advice = f"on two idle cores it takes under {USUAL_S:.0f} s: is the machine busy, or its disk slow?"
    return f"{seconds:.1f} s: {', '.join(done)}", advice if seconds > USUAL_S else ""


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


def prepare(c: pretrain.Config) -> None:
    """A tokenizer and token files."""
    corpus = c.tokenizer_path / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in islice(builtin.documents(), DOCUMENTS)]
    write_file(corpus, "\n".join(lines).encode())
    learn = tokenizer.Config(corpus=[str(corpus)], output_dir=c.tokenizer_path, vocab_size=PIECES, held_out=0.0)
    tokenizer.run(learn)  # refuses to make one that loses text
    preprocess.run(
        preprocess.Config(
            kind="text", input=[corpus], tokenizer_path=learn.model_path, save_dir=Path(c.folders[0]), val_fraction=0.1
        )
    )


def train(c: pretrain.Config) -> str:
    pretrain.run(c)
    losses = [line["loss"] for line in read_metrics(c.out) if "loss" in line]
    if not losses[-1] < losses[0] - 0.5:
        raise ArithmeticError(f"the loss was {losses[0]:.2f} in step 1 and {losses[-1]:.2f} in step {len(losses)}")
    return f"loss {losses[0]:.1f} to {losses[-1]:.1f}"


def resume(c: pretrain.Config) -> str:
    """Take back what came after the checkpoint in the middle, and let the same command make it again."""
    whole = sha256_of(c.out / "bundle" / "model.safetensors")
    shutil.rmtree(checkpoints(c.out / "checkpoints")[0])
    shutil.rmtree(c.out / "bundle")
    pretrain.run(c)
    if sha256_of(c.out / "bundle" / "model.safetensors") != whole:
        raise ArithmeticError("a run resumed from a checkpoint has other weights than one that was not stopped")
    return "resumed to the same bits"


@torch.no_grad()
def reply(folder: Path, kernels: Kernels) -> str:
    """Token by token with the cache, by PyTorch or by our C++, and the same tokens in one pass."""
    bundle = load_bundle(folder, torch.float32, World.start().device)
    model, prompt = bundle.model, [bundle.tokenizer.bos_id, *bundle.tokenizer.encode("The value of")]
    engine = Engine(model, rows=1, kernels=kernels)
    greedy = SamplingConfig(temperature=0)
    completion = engine.submit(Request(prompt=prompt, max_tokens=REPLY_TOKENS, sampling=greedy))
    while engine.has_work:
        engine.step()
    tokens = torch.tensor([[*prompt, *completion.ids]], device=model.head.weight.device)  # (1, T)
    after = model(tokens[:, :-1]).float().log_softmax(-1)  # (1, T - 1, V)
    expected = after.gather(-1, tokens[:, 1:, None]).flatten().cpu()[len(prompt) - 1 :]
    gap = (torch.tensor(completion.logprobs) - expected).abs().max().item()
    if gap > MAX_DIFFERENCE:
        raise ArithmeticError(f"a reply ({kernels}) has log-probabilities {gap:.3g} away from those of one pass")
    return f"reply ({kernels}) = one pass"
