"""How fast does the engine answer beside transformers?  `python benchmarks/inference.py [--save]`, about five minutes

All sides hold the same random weights of nano-327m and run in turns (A-B-C-A-B-C) in one process; what this machine
reads and multiplies per second is measured in the same run. transformers runs its Glm4MoeLiteForCausalLM in bfloat16:
for one row through `generate`, for several by calling the model as `generate` does, without what that does around it.
Its cache holds latents and expands all of them in every step; older versions kept keys and values instead, so that is
a second baseline ("expanded"). The rows of each side share one prompt that is read once. That all compute the same is
checked first.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.run import RESULTS, commit, hardware
from nanollm.generate.engine import Engine
from nanollm.generate.request import Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.speed import (
    Decoding,
    Memory,
    Spread,
    decoding_speed,
    seconds,
    some_tokens,
    time_to_first_token,
)
from nanollm.generate.work import Quantize
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.settings import load_preset
from tests.model.test_reference import reference_settings, reference_weights

PRESET, REPEATS, CONTEXT, PROMPT, REPLY = "nano-327m", 5, 512, 1500, 32
OURS: dict[str, Quantize] = {"nanollm": "none", "nanollm, int8": "int8"}
Peer = transformers.PreTrainedModel
Rate = Callable[[], float]  # measures once; more is better


def both_models() -> tuple[Transformer, Peer]:
    """Ours and transformers', with the same weights."""
    c = ModelConfig(**load_preset("model", PRESET))
    model = Transformer(c).init(0)
    kinds = ["sparse" if c.is_moe(block) else "dense" for block in range(c.n_blocks)]
    settings = reference_settings(c) | {"attn_implementation": "sdpa", "pad_token_id": 0}
    peer = transformers.Glm4MoeLiteForCausalLM(transformers.Glm4MoeLiteConfig(**settings, mlp_layer_types=kinds))
    peer.load_state_dict(reference_weights(model.state_dict(), c))
    return model.to(torch.bfloat16).eval(), peer.to(torch.bfloat16).eval()


def agreement(model: Transformer, peer: Peer) -> dict[str, float]:
    """How far apart the two are after the same prompt, and how far a float32 model is from each."""
    prompt = some_tokens(64, model.config.vocab_size)
    theirs = peer(torch.tensor([prompt])).logits[0, -1].float()
    exact = Transformer(model.config).init(0)(torch.tensor([prompt]))[0, -1]
    engine = Engine(model, rows=1, length=65)
    engine.submit(Request(prompt=prompt, max_tokens=1, top_logprobs=model.config.vocab_size))
    (drawn,) = engine.step()
    assert drawn.scored is not None
    own = torch.empty_like(theirs)
    own[[token for token, _ in drawn.scored.top]] = torch.tensor([logprob for _, logprob in drawn.scored.top])
    theirs, exact = theirs.log_softmax(-1), exact.log_softmax(-1)
    return {
        "transformers_to_nanollm": (theirs - own).abs().max().item(),
        "float32_to_transformers": (exact - theirs).abs().max().item(),
        "float32_to_nanollm": (exact - own).abs().max().item(),
    }


def matmul_speed() -> Spread:
    """GFLOP/s of the largest product of a prompt: (1500, 768) times (768, 6144) in bfloat16."""
    a, b = torch.ones(PROMPT, 768, dtype=torch.bfloat16), torch.ones(6144, 768, dtype=torch.bfloat16)
    torch.nn.functional.linear(a, b)
    times = [seconds(lambda: torch.nn.functional.linear(a, b)) for _ in range(10)]
    return Spread.of([2 * PROMPT * 768 * 6144 / 1e9 / each for each in times])


class ExpandedCache(transformers.DynamicCache):
    """Keeps keys and values of every head, as transformers did before it kept latents."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_latent = keys.shape[1] == 1  # one "head": wait until it is expanded
        return (keys, values) if is_latent else super().update(keys, values, layer_idx, *args, **kwargs)


@contextmanager
def expanding(peer: Peer, cache: ExpandedCache) -> Iterator[None]:
    """Let the model expand new latents only, and remember what came of them."""
    attentions = [layer.self_attn for layer in peer.model.layers]
    for attention in attentions:
        attention.expand_kv = lambda latent, key, own=attention: cache.update(
            *type(own).expand_kv(own, latent, key), own.layer_idx
        )
    try:
        yield
    finally:
        for attention in attentions:
            del attention.expand_kv


class Rows:
    """Rows of transformers that go on after a prompt which is read once for all."""

    def __init__(self, peer: Peer, prompt: list[int], rows: int, *, is_expanded: bool = False) -> None:
        self.peer, self.cache = peer, ExpandedCache() if is_expanded else transformers.DynamicCache()
        self.newest = torch.tensor([prompt])
        self.step()
        self.bytes_per_token = sum(
            layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in self.cache.layers
        )
        self.cache.batch_repeat_interleave(rows)
        self.newest = self.newest.expand(rows, 1).clone()

    def step(self) -> None:
        with expanding(self.peer, self.cache) if isinstance(self.cache, ExpandedCache) else nullcontext():
            seen = self.peer(self.newest, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.newest = seen.logits[:, -1].argmax(-1, keepdim=True)

    def rate(self, steps: int) -> Rate:
        """Tokens/s over some steps."""
        return lambda: len(self.newest) * steps / seconds(lambda: [self.step() for _ in range(steps)])


def our_rows(decoding: Decoding, steps: int) -> Rate:
    return lambda: decoding.rows * steps / sum(decoding.step() for _ in range(steps))


def their_reply(peer: Peer, prompt: list[int]) -> Rate:
    """Tokens/s of `generate` for one row, the short prompt included."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": REPLY, "min_new_tokens": REPLY, "do_sample": False}
    return lambda: REPLY / seconds(lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), **settings))


def our_reply(model: Transformer, prompt: list[int], quantize: Quantize) -> Rate:
    engine = Engine(model, rows=1, length=len(prompt) + REPLY, quantize=quantize)
    request = Request(prompt=prompt, max_tokens=REPLY, sampling=SamplingConfig(temperature=0))

    def reply() -> None:
        engine.submit(request)
        while engine.has_work:
            engine.step()

    return lambda: REPLY / seconds(reply)


def their_prompt(peer: Peer) -> Rate:
    ids = torch.tensor([some_tokens(PROMPT, peer.config.vocab_size)])
    return lambda: PROMPT / seconds(lambda: peer(ids, use_cache=True, logits_to_keep=1))


def our_prompt(model: Transformer) -> Rate:
    engine, fresh = Engine(model, rows=1, length=PROMPT + 1), iter(range(1000))
    ids = some_tokens(PROMPT + 1000, model.config.vocab_size)  # a new beginning each time: nothing can be reused
    return lambda: PROMPT / time_to_first_token(engine, ids[next(fresh) :][:PROMPT])


def in_turns(rates: dict[str, Rate]) -> dict[str, Any]:
    """All measured in turns, after one warm-up each; ratios to the first."""
    for rate in rates.values():
        rate()
    turns = [[rate() for rate in rates.values()] for _ in range(REPEATS)]
    columns = dict(zip(rates, zip(*turns, strict=True), strict=True))
    first = next(iter(columns.values()))
    ratios = {name: [b / a for a, b in zip(first, values, strict=True)] for name, values in columns.items()}
    return {
        "tokens_per_s": {name: dataclasses.asdict(Spread.of(values)) for name, values in columns.items()},
        "ratio_to_transformers": {
            name: dataclasses.asdict(Spread.of(values)) for name, values in list(ratios.items())[1:]
        },
    }


@torch.inference_mode()
def measure() -> dict[str, Any]:
    """All comparisons, each told as it is finished."""
    model, peer = both_models()
    facts: dict[str, Any] = {"agreement": agreement(model, peer)}
    facts["matmul_gflop_per_s"] = dataclasses.asdict(matmul_speed())
    prompt, memory = some_tokens(CONTEXT, model.config.vocab_size), Memory(torch.device("cpu"))
    start = prompt[:16]
    rates = {"transformers": their_reply(peer, start)}
    rates |= {name: our_reply(model, start, quantize) for name, quantize in OURS.items()}
    tell(facts, "one reply", in_turns(rates))
    how: dict[str, Any] = {"repeats": 20, "tokens": 4, "context": 16, "kernels": "native"}
    facts["bandwidth"] = {
        name: decoding_speed(model, memory, 1, quantize=quantize, **how) for name, quantize in OURS.items()
    }
    for rows, steps in ((8, 4), (64, 1)):
        latents, expanded = Rows(peer, prompt, rows), Rows(peer, prompt, rows, is_expanded=True)
        decoding = {
            name: Decoding(model, rows, CONTEXT, (REPEATS + 2) * steps, quantize) for name, quantize in OURS.items()
        }
        rates = {"transformers": latents.rate(steps), "transformers, expanded": expanded.rate(steps)}
        rates |= {name: our_rows(own, steps) for name, own in decoding.items()}
        tell(facts, f"{rows} rows after {CONTEXT} tokens", in_turns(rates))
        facts["cache_bytes_per_token"] = {
            "transformers": latents.bytes_per_token,
            "transformers, expanded": expanded.bytes_per_token,
            "nanollm": decoding["nanollm"].engine.runner.cache_bytes_per_token,
        }
    tell(facts, f"prompt of {PROMPT}", in_turns({"transformers": their_prompt(peer), "nanollm": our_prompt(model)}))
    return facts


def tell(facts: dict[str, Any], name: str, compared: dict[str, Any]) -> None:
    facts[name] = compared
    print(name)
    for side, speed in compared["tokens_per_s"].items():
        ratio = compared["ratio_to_transformers"].get(side)
        times = "" if ratio is None else f"   {ratio['median']:.2f} x ({ratio['least']:.2f} to {ratio['greatest']:.2f})"
        print(
            f"  {side:<24}{speed['median']:8.1f} ({speed['least']:.1f} to {speed['greatest']:.1f}){times}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("`")[0])
    parser.add_argument("--save", action="store_true", help="write all numbers to benchmarks/results/")
    words = parser.parse_args()
    print(f"{PRESET}, tokens/s: median of {REPEATS}, least and greatest; about four minutes", flush=True)
    facts = measure()
    for name, speed in facts["bandwidth"].items():
        share = speed["share_of_memory"]
        low, high = share["least"], share["greatest"]
        print(f"{name}, one row: {share['median']:.0%} ({low:.0%} to {high:.0%}) of memory's speed")
    print(
        json.dumps(
            {name: facts[name] for name in ("agreement", "matmul_gflop_per_s", "cache_bytes_per_token")}, indent=1
        )
    )
    if words.save:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        record = {"benchmark": "inference", "commit": commit(), "hardware": hardware(), "versions": versions} | facts
        path = RESULTS / f"{datetime.date.today().isoformat()}_{hardware()['cores']}-cores_inference.json"
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
