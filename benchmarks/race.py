"""Bits per byte of text none has seen, after as many minutes of one core as nanochat and nanoGPT had.

--nanochat CHECKOUT and --nanogpt CHECKOUT run the training of those projects as it stands there, in copies, with
--python (an environment that has what they need); all sides learn the same documents. nanochat trains a tokenizer and
runs twice: on the documents as they are, and on pieces of 2,400 characters, because its loader fills rows from the
beginnings of documents and drops the rest. nanoGPT, whose tokenizer has 50,257 pieces, reads the ids of ours.

Two sides run at once, each with a core of its own. A short run of each tells its seconds per step, without what it
compiles; then the steps that fit into --minutes are a run. One evaluator judges all: each held-out document by itself,
in windows of the context laid end to end, bits over the bytes of the text; it checks that every side counts the same
bytes. nanochat reads its mark at the beginning of each window, as in training; ours and nanoGPT read the token before.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, spread_of, tell

PIECES, CONTEXT, ROWS = 8192, 512, 4
CUT = 2400
"""Characters of a piece: nearly always less than a window of 512 tokens, and more than half of it."""
TIMED, EVERY = 60, 10
"""Steps of the short run, and those after which ours writes its seconds."""
OURS = ("--model", "nano-1m", "--start", "fast", "--speed.compile", "on")
NANOCHAT = "--depth=2 --matrix-lr=0.08 --embedding-lr=1.2 --unembedding-lr=0.032 --weight-decay=0.07"
"""Rates for steps of 2,048 tokens: its own are for 524,288, and what it makes of them here learns slowly."""
NANOGPT = "--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --learning_rate=2e-3 --min_lr=2e-4 --beta2=0.99"
SEEDED = """
import runpy, sys, torch
seeded, shift = torch.manual_seed, int(sys.argv.pop(1))
torch.manual_seed = lambda seed: seeded(seed + 1000 * shift)
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
(runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
"""
"""Both projects have a fixed seed; this shifts it."""
JUDGE = """
import json, math, sys, pyarrow.parquet as pq, torch
def judge(encode, size_of, nats_of, bos, again):
    rows = []
    for text in pq.read_table(sys.argv[1])["text"].to_pylist():
        ids = encode(text)
        assert sum(map(size_of, ids)) == len(text.encode())
        for begin in range(0, len(ids), CONTEXT):
            part = ids[begin : begin + CONTEXT]
            before = bos if again or begin == 0 else ids[begin - 1]
            rows.append((begin == 0, [before, *part[:-1]], part))
    facts = {"bytes": 0, "tokens": sum(len(part) for _, _, part in rows)}
    sums = {True: [0.0, 0], False: [0.0, 0]}
    with torch.no_grad():
        for begin in range(0, len(rows), 16):
            group = rows[begin : begin + 16]
            read = torch.tensor([row + [bos] * (CONTEXT - len(row)) for _, row, _ in group])
            due = torch.tensor([row + [bos] * (CONTEXT - len(row)) for _, _, row in group])
            nats = nats_of(read, due).double()
            for (first, row, part), line in zip(group, nats):
                sums[first][0] += line[: len(row)].sum().item()
                sums[first][1] += sum(map(size_of, part))
    bits = lambda *kinds: sum(sums[k][0] for k in kinds) / math.log(2) / sum(sums[k][1] for k in kinds)
    facts["bytes"] = sums[True][1] + sums[False][1]
    print(json.dumps(facts | {"whole": bits(True, False), "first": bits(True)}))
""".replace("CONTEXT", str(CONTEXT))
JUDGE_OURS = """
from nanollm.bundle import load_bundle
bundle = load_bundle(f"{sys.argv[2]}/{sys.argv[3]}/bundle")
sizes, model = bundle.tokenizer.token_bytes.tolist(), bundle.model.eval()
def nats_of(read, due):
    return torch.nn.functional.cross_entropy(model(read).float().mT, due, reduction="none")
judge(bundle.tokenizer.encode, sizes.__getitem__, nats_of, bundle.tokenizer.bos_id, False)
"""
JUDGE_NANOCHAT = """
from nanochat.checkpoint_manager import load_model
from nanochat.tokenizer import get_token_bytes
model, tokenizer, _ = load_model("base", torch.device("cpu"), phase="eval", model_tag=sys.argv[3])
sizes = get_token_bytes().tolist()
def nats_of(read, due):
    return model(read, due, loss_reduction="none").view(due.shape).float()
judge(tokenizer.encode, sizes.__getitem__, nats_of, tokenizer.get_bos_token_id(), True)
"""
JUDGE_NANOGPT = """
from model import GPT, GPTConfig
saved = torch.load(f"{sys.argv[2]}/{sys.argv[3]}/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict({name.removeprefix("_orig_mod."): each for name, each in saved["model"].items()})
model.eval()
from nanollm.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load(f"{sys.argv[2]}/tokenizer")
def nats_of(read, due):
    return torch.nn.functional.cross_entropy(model(read, due)[0].float().mT, due, reduction="none")
judge(tokenizer.encode, tokenizer.token_bytes.tolist().__getitem__, nats_of, tokenizer.bos_id, False)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanochat", type=Path, required=True, help="a checkout of nanochat", metavar="CHECKOUT")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT", metavar="CHECKOUT")
    parser.add_argument("--python", default=sys.executable, help="interpreter with what they need")
    parser.add_argument("--minutes", type=float, default=15.0, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="of each side, instead of a short run")
    parser.add_argument("--only", nargs="+", default=[], help="names of the sides (ours, nanochat, pieces, nanogpt)")
    parser.add_argument("--ours", default="", help="more options of `nanollm pretrain`")
    parser.add_argument("--nanochat_options", default=NANOCHAT, help="of its base_train")
    parser.add_argument("--nanogpt_options", default=NANOGPT, help="of its train.py")
    parser.add_argument("--documents", type=int, default=128, help="held-out documents")
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared/data/openwebtext", help="Parquet files")
    parser.add_argument("--work", type=Path, required=True, help="folder for text, copies and runs, which are kept")


@dataclass(frozen=True)
class Side:
    """How one project trains for a number of steps and is judged."""

    name: str
    train: Callable[[str, int, int], list[str]]
    """Words of the command by the name of the run, its steps and its seed."""
    judge: list[str]
    """Words of the judging command before the name of the run."""
    folder: Path
    env: dict[str, str]
    step_s: Callable[[Path, str], float]
    """Seconds per step, by the folder and the printed words of a run."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(options, work)
    sides = {side.name: side for side in all_sides(options, work) if not options.only or side.name in options.only}
    if options.steps and len(options.steps) != len(sides):
        raise ValueError(f"--steps: expected {len(sides)} numbers for {', '.join(sides)}, got {len(options.steps)}")
    steps_of = dict(zip(sides, options.steps, strict=False))
    if not steps_of:
        for pair in in_pairs(sides.values()):
            names = [f"timed-{side.name}" for side in pair]
            shutil.rmtree(work / "timed-ours", ignore_errors=True)
            for side, name, words in zip(pair, names, at_once(pair, names, [TIMED] * 2, 0), strict=True):
                per_step = side.step_s(work / name, words)
                steps_of[side.name] = int(options.minutes * 60 / per_step)
                tell(f"{side.name}: {per_step:.4f} s per step, {steps_of[side.name]} steps")
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for seed in range(options.seeds):
        for pair in in_pairs(sides.values()):
            names = [f"{side.name}-{steps_of[side.name]}-{seed}" for side in pair]
            at_once(pair, names, [steps_of[side.name] for side in pair], seed)
            for side, name in zip(pair, names, strict=True):
                scores[side.name].append(json.loads(words_of(side, [*side.judge, name]).splitlines()[-1]))
                tell(f"{name}: {scores[side.name][-1]}")
    return {
        "unit": "bits per byte",
        "sides": {
            name: {kind: spread_of([each[kind] for each in lines]) for kind in ("whole", "first")}
            | {"steps": steps_of[name], "held_out_tokens": lines[0]["tokens"]}
            for name, lines in scores.items()
        },
        "checks": {"same bytes": len({each["bytes"] for lines in scores.values() for each in lines}) == 1},
    }


def in_pairs(sides: Any) -> list[list[Side]]:
    every = list(sides)
    return [every[begin : begin + 2] for begin in range(0, len(every), 2)]


# --- text and copies ---


def prepare(options: argparse.Namespace, work: Path) -> None:
    """The documents as Parquet, both tokenizers, token files and copies of the checkouts, unless they are there."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (work / "ready").exists():
        return
    files = sorted(options.corpus.glob("*.parquet"))
    documents = [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]
    np.random.default_rng(0).shuffle(documents)
    held_out, train = documents[: options.documents], documents[options.documents :]
    pieces = [text[begin : begin + CUT] for text in train for begin in range(0, len(text), CUT)]
    np.random.default_rng(1).shuffle(pieces)
    for name, texts in (("train", train), ("val", held_out), ("pieces", pieces)):
        pq.write_table(pa.table({"text": texts}), work / f"{name}.parquet", row_group_size=256)
    for name, source in (("nanochat", "train"), ("pieces", "pieces")):
        data = work / f"{name}-base" / "base_data_climbmix"
        data.mkdir(parents=True)
        shutil.copyfile(work / f"{source}.parquet", data / "shard_00000.parquet")
        shutil.copyfile(work / "val.parquet", data / "shard_00001.parquet")
    nanollm = [sys.executable, "-m", "nanollm"]
    text, tokenizer = work / "train.parquet", ["--vocab_size", str(PIECES), "--output_dir", str(work / "tokenizer")]
    subprocess.run([*nanollm, "tokenizer", "--corpus", str(text), *tokenizer], check=True)
    encode = ["--tokenizer_path", str(work / "tokenizer"), "--save_dir", str(work / "data")]
    val = ["--val_input", str(work / "val.parquet")]
    subprocess.run([*nanollm, "preprocess", "text", "--input", str(text), *val, *encode], check=True)
    copy_of(options.nanochat, work / "nanochat", "scripts/base_train.py")
    learn = [options.python, "-m", "scripts.tok_train", f"--vocab-size={PIECES}"]
    base = work / "nanochat-base"
    subprocess.run(learn, cwd=work / "nanochat", env={**os.environ, "NANOCHAT_BASE_DIR": str(base)}, check=True)
    shutil.copytree(base / "tokenizer", work / "pieces-base" / "tokenizer")
    if options.nanogpt:
        copy_of(options.nanogpt, work / "nanoGPT", "train.py")
        data = work / "nanoGPT" / "data" / "race"
        data.mkdir()
        for split in ("train", "val"):
            ids = np.concatenate([np.load(file) for file in sorted((work / "data").glob(f"{split}-?????.npy"))])
            ids.astype(np.uint16).tofile(data / f"{split}.bin")
        code = f"import pickle; pickle.dump({{'vocab_size': {PIECES}}}, open('meta.pkl', 'wb'))"
        subprocess.run([sys.executable, "-c", code], cwd=data, check=True)
    (work / "ready").touch()


def copy_of(checkout: Path, target: Path, needed: str) -> None:
    if not (checkout / needed).exists():
        raise ValueError(f"{checkout} is no checkout of {target.name}: there is no {needed}")
    shutil.copytree(checkout, target, ignore=shutil.ignore_patterns(".git", "out*"))


# --- the sides ---


def all_sides(options: argparse.Namespace, work: Path) -> list[Side]:
    def ours(name: str, steps: int, seed: int) -> list[str]:
        shape = ["--model.vocab_size", str(PIECES), "--model.context_length", str(CONTEXT)]
        text = ["--data", str(work / "data"), "--tokenizer_path", str(work / "tokenizer"), "--sample_prompts", "none"]
        length = [
            "--train.steps",
            str(steps),
            "--train.batch_size",
            str(ROWS),
            "--train.micro_batch_size",
            str(ROWS),
            "--optim.warmup_steps",
            "50",
        ]
        quiet = ["--validation_windows", "8", "--train.validate_every", "100000", "--train.log_every", str(EVERY)]
        words = [sys.executable, "-m", "nanollm", "pretrain", *OURS, *shape, *text, *length, *quiet]
        return [*words, "--seed", str(seed), "--out", str(work / name), *shlex.split(options.ours)]

    def nanochat(name: str, steps: int, seed: int) -> list[str]:
        rows = [f"--max-seq-len={CONTEXT}", f"--device-batch-size={ROWS}", f"--total-batch-size={ROWS * CONTEXT}"]
        quiet = ["--core-metric-every=-1", "--sample-every=-1", "--eval-every=-1", "--window-pattern=L"]
        words = [options.python, "-c", SEEDED, str(seed), "scripts.base_train", f"--num-iterations={steps}"]
        return [*words, f"--model-tag={name}", *rows, *quiet, *shlex.split(options.nanochat_options)]

    def nanogpt(name: str, steps: int, seed: int) -> list[str]:
        shape = [f"--block_size={CONTEXT}", f"--batch_size={ROWS}", "--gradient_accumulation_steps=1"]
        length = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--warmup_iters=50", f"--eval_interval={steps}"]
        quiet = ["--dataset=race", "--device=cpu", "--compile=True", "--eval_iters=2", f"--out_dir={work / name}"]
        words = [options.python, "-c", SEEDED, str(seed), "train.py"]
        return [*words, *shape, *length, *quiet, *shlex.split(options.nanogpt_options)]

    def logged(folder: Path, _: str) -> float:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["seconds"] for line in lines if line.get("step", 0) > 20 and "seconds" in line]
        return statistics.median(seconds) / EVERY

    def printed(pattern: str) -> Callable[[Path, str], float]:
        return lambda _, words: statistics.median([float(ms) for ms in re.findall(pattern, words)][20:]) / 1000

    def side(name: str, train: Any, judge: str, folder: Path, env: dict[str, str], step_s: Any) -> Side:
        python = options.python if train is nanochat else sys.executable
        words = [python, "-c", JUDGE + judge, str(work / "val.parquet"), str(work)]
        return Side(name, train, words, folder, env, step_s)

    def chat(name: str) -> Side:
        env = {"NANOCHAT_BASE_DIR": str(work / f"{name}-base"), "NANOCHAT_DTYPE": "bfloat16"}
        return side(name, nanochat, JUDGE_NANOCHAT, work / "nanochat", env, printed(r"dt: ([\d.]+)ms"))

    sides = [side("ours", ours, JUDGE_OURS, work, {}, logged), chat("nanochat"), chat("pieces")]
    if options.nanogpt:
        env = {"PYTHONPATH": str(ROOT)}
        sides.append(side("nanogpt", nanogpt, JUDGE_NANOGPT, work / "nanoGPT", env, printed(r"time ([\d.]+)ms")))
    return sides


# --- processes ---


def at_once(pair: list[Side], names: list[str], steps: list[int], seed: int) -> list[str]:
    """What each side printed while it trained, all at the same time, each on a core of its own."""
    running = [
        subprocess.Popen(
            ["taskset", "-c", str(core), *side.train(name, n, seed)],
            **surroundings(side),
            stdout=(side.folder / f"{name}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for core, (side, name, n) in enumerate(zip(pair, names, steps, strict=False))
    ]
    for side, name, process in zip(pair, names, running, strict=False):
        if process.wait() != 0:
            raise ValueError(f"{side.name} ended with status {process.returncode}; see {side.folder / name}.log")
    return [(side.folder / f"{name}.log").read_text() for side, name in zip(pair, names, strict=False)]


def words_of(side: Side, command: list[str]) -> str:
    done = subprocess.run(command, **surroundings(side), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def surroundings(side: Side) -> dict[str, Any]:
    return {"cwd": side.folder, "env": {**os.environ, "OMP_NUM_THREADS": "1", **side.env}}
