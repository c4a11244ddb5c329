"""Text to token files with two workers, beside one `encode` per document as the original does it.

Both sides read the same Parquet files and write the ids of each document between <s> and </s> as uint16. The original's
loop: one Python process, one SentencePiece `encode` per document, the ids copied into a memory-mapped array. Ours is
what `nanollm preprocess owt` does; the start of its processes, checksums, waiting for the disk and the manifest are in
its time. Neither has seen a word before. Not timed: training the tokenizer on the same text, Python's own start, and
the few seconds in which spelling.cpp is compiled, once on each machine.
"""

import argparse
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from benchmarks.measuring import add_data_option, data_folder, in_turns, seconds, tell
from nanollm.sources.datasets import openwebtext
from nanollm.stages import preprocess
from nanollm.text.train_tokenizer import train


def add_options(parser: argparse.ArgumentParser) -> None:
    add_data_option(parser)
    parser.add_argument("--vocab_size", type=int, default=50_304, help="of the tokenizer")
    parser.add_argument("--num_workers", type=int, default=2, help="processes of ours")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    source = data_folder(options, "openwebtext") / "openwebtext"
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), list(openwebtext([source], on_bad=refuse))
        tokenizer = train(texts, folder / "tokenizer.model", vocab_size=options.vocab_size)
        tokenizer.remember_words()  # compiles
        size = sum(len(text.encode()) for text in texts)
        most_ids = size + 2 * len(texts)
        del texts, tokenizer
        written: dict[str, str] = {}

        def speed(side: str) -> float:
            if side == "original":
                elapsed = seconds(lambda: one_by_one(source, folder, most_ids))
            else:
                shutil.rmtree(folder / "ours", ignore_errors=True)
                elapsed = seconds(lambda: preprocess.run(config_of(source, folder, options.num_workers)))
            written[side] = fingerprint(folder / ("original.bin" if side == "original" else "ours/train-00000.npy"))
            return size / 1e6 / elapsed

        sides = {"the original's loop": lambda: speed("original"), "nanollm preprocess": lambda: speed("ours")}
        compared = in_turns(sides, options.repeats)
    return {
        "unit": "MB/s",
        **compared,
        "megabytes": size / 1e6,
        "checks": {"same_ids": written["original"] == written["ours"]},
    }


def refuse(record: object) -> None:
    raise ValueError(f"{record}; this benchmark needs text without bad records")


def one_by_one(source: Path, folder: Path, most_ids: int) -> None:
    """The original's loop, but that its array is cut to what it holds."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = np.memmap(folder / "original.bin", dtype=np.uint16, mode="w+", shape=(most_ids,))
    end = 0
    for text in openwebtext([source], on_bad=refuse):
        tokens = [sp.bos_id(), *sp.encode(text), sp.eos_id()]
        ids[end : end + len(tokens)] = tokens
        end += len(tokens)
    ids.flush()
    with (folder / "original.bin").open("r+b") as file:
        file.truncate(2 * end)


def config_of(source: Path, folder: Path, num_workers: int) -> preprocess.Config:
    return preprocess.Config(
        kind="owt",
        input=[source],
        tokenizer_path=folder / "tokenizer.model",
        save_dir=folder / "ours",
        val_fraction=0.0,  # all in one file, as the loop writes them
        num_workers=num_workers,
    )


def fingerprint(path: Path) -> str:
    """sha256 of the ids of a file."""
    ids = np.load(path) if path.suffix == ".npy" else np.fromfile(path, dtype=np.uint16)
    tell(f"{path.name}: {len(ids):,} ids")
    return hashlib.sha256(ids.tobytes()).hexdigest()
