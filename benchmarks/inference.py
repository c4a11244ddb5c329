"""Speed of the engine, beside transformers.

All sides hold the same random weights of nano-327m and run in turns (A-B-C-A-B-C) in one process; what this machine
reads and multiplies per second is measured in the same run; about five minutes. transformers runs its
Glm4MoeLiteForCausalLM in bfloat16: for one row through `generate`, for several by calling the model as `generate` does,
without what that does around it. Its cache holds latents and expands all of them in every step; older versions kept
keys and values instead, so that is a second baseline ("expanded"). The rows of each side share one prompt that is read
once. That all compute the same is checked first.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.measuring import in_turns, matmul_roof, tell
from benchmarks.peers import transformers_twin
from nanollm.config import load_preset
from nanollm.generate.engine import Engine
from nanollm.generate.request import Quantize, Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.stages.bench import Decoding, Memory, decoding_speed, seconds, some_tokens, time_to_first_token

PRESET, CONTEXT, PROMPT, REPLY = "nano-327m", 512, 1500, 32
OURS: dict[str, Quantize] = {"nanollm": "none", "nanollm, int8": "int8"}
Peer = transformers.PreTrainedModel
Rate = Callable[[], float]  # measures once; more is better


def both_models() -> tuple[Transformer, Peer]:
    """Ours and transformers', with the same weights."""
    model = Transformer(ModelConfig(**load_preset("model", PRESET))).init(0)
    peer = transformers_twin(model)
    return model.to(torch.bfloat16).eval(), peer.to(torch.bfloat16).eval()


def agreement(model: Transformer, peer: Peer) -> dict[str, float]:
    """How far apart the two are after the same prompt, and how far a float32 model is from each."""
    prompt = some_tokens(64, model.config.vocab_size)
    theirs = peer(torch.tensor([prompt])).logits[0, -1].float()
    exact = Transformer(model.config).init(0)(torch.tensor([prompt]))[0, -1]
    engine = Engine(model, rows=1, length=65)
    engine.submit(Request(prompt=prompt, max_tokens=1, top_logprobs=model.config.vocab_size))
    (drawn,) = engine.step()
    assert drawn.logprobs is not None
    own = torch.empty_like(theirs)
    own[[token for token, _ in drawn.logprobs.top]] = torch.tensor([logprob for _, logprob in drawn.logprobs.top])
    theirs, exact = theirs.log_softmax(-1), exact.log_softmax(-1)
    return {
        "transformers_to_nanollm": (theirs - own).abs().max().item(),
        "float32_to_transformers": (exact - theirs).abs().max().item(),
        "float32_to_nanollm": (exact - own).abs().max().item(),
    }


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


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, peer = both_models()
    repeats = options.repeats
    facts: dict[str, Any] = {"checks": {"largest_logprob_difference": agreement(model, peer)}}
    facts["roof"] = {"matmul_gflop_per_s": matmul_roof([(PROMPT, 768, 6144)], torch.bfloat16)}
    prompt, memory = some_tokens(CONTEXT, model.config.vocab_size), Memory(torch.device("cpu"))
    start = prompt[:16]
    rates = {"transformers": their_reply(peer, start)}
    rates |= {name: our_reply(model, start, quantize) for name, quantize in OURS.items()}
    facts["one reply"] = compared(rates, repeats)
    how: dict[str, Any] = {"repeats": 20, "tokens": 4, "context": 16, "kernels": "native"}
    facts["bandwidth"] = {
        name: decoding_speed(model, memory, 1, quantize=quantize, **how) for name, quantize in OURS.items()
    }
    for rows, steps in ((8, 4), (64, 1)):
        latents, expanded = Rows(peer, prompt, rows), Rows(peer, prompt, rows, is_expanded=True)
        decoding = {
            name: Decoding(model, rows, CONTEXT, (repeats + 2) * steps, quantize) for name, quantize in OURS.items()
        }
        rates = {"transformers": latents.rate(steps), "transformers, expanded": expanded.rate(steps)}
        rates |= {name: our_rows(own, steps) for name, own in decoding.items()}
        facts[f"{rows} rows after {CONTEXT} tokens"] = compared(rates, repeats)
        facts["cache_bytes_per_token"] = {
            "transformers": latents.bytes_per_token,
            "transformers, expanded": expanded.bytes_per_token,
            "nanollm": decoding["nanollm"].engine.runner.cache_bytes_per_token,
        }
    rates = {"transformers": their_prompt(peer), "nanollm": our_prompt(model)}
    facts[f"prompt of {PROMPT}"] = compared(rates, repeats)
    return facts


def compared(rates: dict[str, Rate], repeats: int) -> dict[str, Any]:
    tell(", ".join(rates))
    return {"unit": "tokens/s", **in_turns(rates, repeats, warm_up=True)}
