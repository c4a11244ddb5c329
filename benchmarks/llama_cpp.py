"""How fast does the engine write beside llama.cpp?  `python benchmarks/llama_cpp.py [--save]`, about three minutes

One reply after a short prompt, for nano-327m and nano-327m-fine with random weights: the engine in bfloat16 and int8,
llama.cpp with the GGUFs that `nanollm export` writes of the same weights, in bf16 and q8_0. All run in turns in one
process (llama.cpp as the llama-server of the package xllamacpp) with the same number of threads. llama.cpp counts its
own time per token; what this machine reads per second is measured in the same run. Both read other amounts: dense
blocks behind the first Mixture of Experts are padded in a GGUF (docs/decisions/0011-export.md).
"""

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
import xllamacpp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.run import RESULTS, commit, hardware
from nanollm.bundle import Bundle
from nanollm.export.gguf import GgufType, write_gguf
from nanollm.generate.speed import Decoding, Memory, Spread, some_tokens
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.settings import load_preset
from nanollm.sources import builtin
from nanollm.text.learn import Sample, train_on

PRESETS = ("nano-327m", "nano-327m-fine")
REPEATS, PROMPT, REPLY = 5, 16, 32
GGUFS: tuple[GgufType, ...] = ("bf16", "q8_0")
Rate = Callable[[], float]  # tokens/s, measured once


def bundle_of(preset: str) -> Bundle:
    """Random weights; the tokenizer has fewer pieces than the model, the rest are unused."""
    texts = [text.encode() for text, _ in zip(builtin.documents(), range(500), strict=False)]
    tokenizer = train_on(Sample(texts, 0), vocab_size=4096, model_type="bpe")
    config = ModelConfig(**load_preset("model", preset))
    return Bundle(Transformer(config).init(0).eval(), tokenizer, {"made_by": "a benchmark"})


def llama_cpp(path: Path) -> Rate:
    """Of llama.cpp for the tokens after the first."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    question = {"prompt": some_tokens(PROMPT, 4096), "n_predict": REPLY, "temperature": 0, "ignore_eos": True}
    body = json.dumps(question | {"cache_prompt": False}).encode()

    def rate() -> float:
        with urlopen(Request(f"{server.listening_address}/completion", body)) as answer:
            return float(json.load(answer)["timings"]["predicted_per_second"])

    return rate


def nanollm(decoding: Decoding) -> Rate:
    return lambda: REPLY / sum(decoding.step() for _ in range(REPLY))


@torch.inference_mode()
def measure(preset: str) -> dict[str, Any]:
    """Tokens/s of each side, in turns after one warm-up."""
    bundle, memory = bundle_of(preset), Memory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        rates: dict[str, Rate] = {}
        for dtype in GGUFS:
            path = Path(folder) / f"{dtype}.gguf"
            write_gguf(path, bundle, dtype)
            rates[f"llama.cpp {dtype}"] = llama_cpp(path)
        model = bundle.model.to(torch.bfloat16)
        steps = REPLY * (REPEATS + 2)
        rates["nanollm bf16"] = nanollm(Decoding(model, 1, PROMPT, steps, "none"))
        rates["nanollm int8"] = nanollm(Decoding(model, 1, PROMPT, steps, "int8"))
        for rate in rates.values():
            rate()
        turns = [[memory.gb_per_s(), *(rate() for rate in rates.values())] for _ in range(REPEATS)]
    columns = dict(zip(["memory GB/s", *rates], zip(*turns, strict=True), strict=True))
    pairs = {"bf16": ("nanollm bf16", "llama.cpp bf16"), "8 bits": ("nanollm int8", "llama.cpp q8_0")}
    ratios = {
        name: [ours / theirs for ours, theirs in zip(columns[one], columns[other], strict=True)]
        for name, (one, other) in pairs.items()
    }
    return {
        "tokens_per_s": {name: dataclasses.asdict(Spread.of(values)) for name, values in columns.items()},
        "nanollm_over_llama_cpp": {name: dataclasses.asdict(Spread.of(values)) for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("`")[0])
    parser.add_argument("--save", action="store_true", help="write all numbers to benchmarks/results/")
    words = parser.parse_args()
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "xllamacpp")}
    record: dict[str, Any] = {"benchmark": "llama_cpp", "commit": commit(), "hardware": hardware()}
    record["versions"] = versions
    for preset in PRESETS:
        record[preset] = measure(preset)
        for group in record[preset].values():
            for name, spread in group.items():
                low, high = spread["least"], spread["greatest"]
                print(f"{preset:<16}{name:<16}{spread['median']:8.2f} ({low:.2f} to {high:.2f})", flush=True)
    if words.save:
        path = RESULTS / f"{datetime.date.today().isoformat()}_{hardware()['cores']}-cores_llama_cpp.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
