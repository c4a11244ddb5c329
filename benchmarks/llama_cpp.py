"""How fast does the engine write beside llama.cpp?

One reply after a short prompt, for nano-327m and nano-327m-fine with random weights: the engine in bfloat16, int8 and
int4, llama.cpp with the GGUFs that `nanollm export` writes of them, in bf16, q8_0 and q4_0; about four minutes. All
run in turns in one process (llama.cpp as the llama-server of the package xllamacpp) with the same number of threads.
llama.cpp counts its own time per token; what this machine reads per second is measured in the same turns. Both read
other amounts: dense blocks behind the first Mixture of Experts are padded in a GGUF (docs/decisions/0011-export.md).
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
import xllamacpp

from benchmarks.measuring import in_turns, tell
from nanollm.bundle import Bundle
from nanollm.config import load_preset
from nanollm.export.dense_to_moe import Dtype
from nanollm.export.gguf import write_gguf
from nanollm.generate.request import Quantize
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.sources import builtin
from nanollm.stages.bench import Decoding, Memory, some_tokens
from nanollm.text.train_tokenizer import Sample, train_on

PRESETS = ("nano-327m", "nano-327m-fine")
PROMPT, REPLY = 16, 32
KINDS: tuple[tuple[Dtype, Quantize], ...] = (("bf16", "none"), ("q8_0", "int8"), ("q4_0", "int4"))
"""What llama.cpp reads, and ours with as many bits."""
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
def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {preset: of_preset(preset, options.repeats) for preset in PRESETS}


def of_preset(preset: str, repeats: int) -> dict[str, Any]:
    """Tokens/s of llama.cpp and ours for each number of bits."""
    bundle, memory, facts = bundle_of(preset), Memory(torch.device("cpu")), {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {dtype: Path(folder) / f"{dtype}.gguf" for dtype, _ in KINDS}
        for dtype, path in paths.items():
            write_gguf(path, bundle, dtype)
        theirs = {dtype: llama_cpp(path) for dtype, path in paths.items()}
        model = bundle.model.to(torch.bfloat16)
        for dtype, quantize in KINDS:
            tell(f"{preset}, {dtype}")
            decoding = Decoding(model, 1, PROMPT, REPLY * (repeats + 2), quantize)
            sides = {f"llama.cpp {dtype}": theirs[dtype], f"nanollm {quantize}": nanollm(decoding)}
            roof = {"read_gb_per_s": memory.gb_per_s}
            facts[dtype] = {"unit": "tokens/s", **in_turns(sides, repeats, roof=roof, warm_up=True)}
    return facts
