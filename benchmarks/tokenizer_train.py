"""Time and memory of training a tokenizer, beside SentencePiece as the original calls it.

From the same Parquet files to the file of a model, byte pair encoding with byte fallback and single digits. The
original's way: every document becomes one line of a file, its newlines spaces, which SentencePiece reads with its
default settings otherwise, except that no line is too long for it (with its default it drops long documents without a
word). Ours is what `nanollm tokenizer` does, which also keeps newlines, indentation and all else. Every turn of a side
is a process of its own, whose peak memory is read at its end; its imports are not timed. How well each spells is
measured on GSM8K's questions and answers, which it has not seen.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from benchmarks.measuring import ROOT, add_data_option, data_folder, in_turns, peak_memory_gb, seconds, spread_of
from nanollm.sources.datasets import openwebtext
from nanollm.sources.files import read_rows
from nanollm.text.tokenizer import Tokenizer
from nanollm.text.train_tokenizer import train

MEMORY_LIMIT_GB = 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    add_data_option(parser)
    parser.add_argument("--vocab_size", type=int, default=50_304, help="pieces of both models")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    folder = data_folder(options, "openwebtext", "gsm8k")
    size = sum(len(text.encode()) for text in openwebtext([folder / "openwebtext"], refuse))
    unseen = ["\n".join(row) for row in read_rows([folder / "gsm8k" / "train.jsonl"], ["question", "answer"], refuse)]
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    spelled: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:

        def turn(side: str) -> float:
            model = Path(name) / f"{side.replace(' ', '_')}.model"
            elapsed, peak = in_a_process(side, folder / "openwebtext", model, options.vocab_size)
            peaks[side].append(peak)
            spelled[side] = bytes_per_token(model, unseen)
            return size / 1e6 / elapsed

        compared = in_turns({side: lambda side=side: turn(side) for side in SIDES}, options.repeats)  # type: ignore[misc]
        ours = Tokenizer.load(Path(name) / "nanollm.model")
        keeps_all = all(ours.decode(ours.encode(text)) == text for text in unseen[:200])
    return {
        "unit": "MB/s",
        **compared,
        "megabytes": size / 1e6,
        "peak_memory_gb": {side: spread_of(values) for side, values in peaks.items()},
        "bytes_per_token": spelled,
        "checks": {
            "vocab_size": ours.vocab_size == options.vocab_size,
            "keeps_every_character": keeps_all,
            "spells_as_well": spelled["nanollm"] > 0.98 * spelled["as the original"],
            "memory_below_2_gb": max(peaks["nanollm"]) < MEMORY_LIMIT_GB,
        },
    }


def refuse(record: object) -> None:
    raise ValueError(f"{record}; this benchmark needs text without bad records")


def bytes_per_token(model: Path, texts: list[str]) -> float:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return sum(len(text.encode()) for text in texts) / sum(len(sp.encode(text)) for text in texts)


# --- one turn, in a process of its own ---


def as_the_original(source: Path, model: Path, vocab_size: int) -> None:
    corpus = model.with_suffix(".txt")
    with corpus.open("w", encoding="utf-8") as file:
        for text in openwebtext([source], refuse):
            file.write(text.replace("\n", " ") + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(model.with_suffix("")),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        max_sentence_length=2**30,  # bytes
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
    )


def as_we_do(source: Path, model: Path, vocab_size: int) -> None:
    train(openwebtext([source], refuse), model, vocab_size=vocab_size)


SIDES: dict[str, Callable[[Path, Path, int], None]] = {"as the original": as_the_original, "nanollm": as_we_do}


def in_a_process(side: str, source: Path, model: Path, vocab_size: int) -> tuple[float, float]:
    """Seconds, and GB of peak memory."""
    command = [sys.executable, "-m", "benchmarks.tokenizer_train", side, str(source), str(model), str(vocab_size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed: {done.stderr.strip()[-2000:]}")
    elapsed, peak = json.loads(done.stdout.splitlines()[-1])
    return elapsed, peak


if __name__ == "__main__":
    work, source, model = SIDES[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    elapsed = seconds(lambda: work(source, model, int(sys.argv[4])))
    print(json.dumps([elapsed, peak_memory_gb()]))
