"""How much faster does `preprocess` run with two processes than with one?  On the built-in corpus, eight times over."""

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import in_turns, seconds
from nanollm.sources import builtin
from nanollm.stages import preprocess
from nanollm.text.train_tokenizer import train


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, documents = Path(name), list(builtin.documents())
        with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
            for text in documents * 8:
                file.write(json.dumps({"text": text}) + "\n")
        train(documents, folder / "tokenizer.model", vocab_size=8192)
        megabytes = (folder / "corpus.jsonl").stat().st_size / 1e6
        written: dict[str, str] = {}

        def speed(side: str, workers: int) -> float:
            elapsed, written[side] = prepared_in(folder, workers)
            return megabytes / elapsed

        sides = {"one process": lambda: speed("one process", 1), "two": lambda: speed("two", 2)}
        compared = in_turns(sides, options.repeats)
    return {"unit": "MB/s", **compared, "checks": {"same_files": len(set(written.values())) == 1}}


def prepared_in(folder: Path, num_workers: int) -> tuple[float, str]:
    """Seconds that preprocess takes, the start of its processes included, and the sha256 of what it wrote."""
    out = folder / "tokens"
    config = preprocess.Config(
        kind="text",
        input=[folder / "corpus.jsonl"],
        tokenizer_path=folder / "tokenizer.model",
        save_dir=out,
        num_workers=num_workers,
    )
    elapsed = seconds(lambda: preprocess.run(config))
    shards = sorted(out.glob("*.npy"))
    assert shards, f"preprocess wrote no token files to {out}"
    fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()
    shutil.rmtree(out)
    return elapsed, fingerprint
