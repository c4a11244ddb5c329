"""How fast does the engine answer beside transformers?  `python benchmarks/inference.py [--save]`, about five minutes

Both sides hold the same random weights of nano-327m in bfloat16 and run in turns (A-B-A-B) in one process; what this
machine reads and multiplies per second is measured in the same run. transformers runs its Glm4MoeLiteForCausalLM with
its own cache: for one row through `generate`, for several by calling the model as `generate` does, without what that
does around it. Its rows share one prompt that it reads once, as ours do. That both compute the same is checked first.
"""

import dataclasses
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

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
Peer = transformers.PreTrainedModel
Rate = Callable[[], float]  # measures once; more is better


def both_models() -> tuple[Transformer, Peer]:
    """Ours and transformers', with the same weights."""
    c = ModelConfig(**load_preset("model", PRESET))
    model = Transformer(c).init(0)
    kinds = ["sparse" if c.is_moe(block) else "dense" for block in range(c.n_blocks)]
    settings = reference_settings(c) | {"attn_implementation": "sdpa", "pad_token_id": 0}
    peer = transformers.Glm4MoeLiteForCausalLM(transformers.Glm4MoeLiteConfig(**settings, mlp_layer_types=kinds))
    peer.load_state_dict(reference_weights(model))
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


def their_rows(peer: Peer, prompt: list[int], rows: int, steps: int) -> Rate:
    """Tokens/s of transformers over some steps of rows that go on after a prompt."""
    seen = peer(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    cache = seen.past_key_values
    cache.batch_repeat_interleave(rows)
    newest = seen.logits[:, -1].argmax(-1, keepdim=True).expand(rows, 1).clone()

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            newest[:] = peer(newest, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        return rows * steps / (time.perf_counter() - started)

    return measure


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


def in_turns(theirs: Rate, ours: Rate) -> dict[str, dict[str, float]]:
    """Both measured alternately, after one warm-up each."""
    theirs(), ours()
    pairs = [(theirs(), ours()) for _ in range(REPEATS)]
    columns = {
        "transformers": [a for a, _ in pairs],
        "nanollm": [b for _, b in pairs],
        "ratio": [b / a for a, b in pairs],
    }
    return {name: dataclasses.asdict(Spread.of(values)) for name, values in columns.items()}


@torch.inference_mode()
def measure() -> dict[str, Any]:
    """All comparisons, each told as it is finished."""
    model, peer = both_models()
    facts: dict[str, Any] = {"agreement": agreement(model, peer)}
    facts["matmul_gflop_per_s"] = dataclasses.asdict(matmul_speed())
    prompt = some_tokens(CONTEXT, model.config.vocab_size)
    for quantize in ("none", "int8"):
        name = f"reply, 1 row, {'bfloat16' if quantize == 'none' else quantize}"
        tell(facts, name, in_turns(their_reply(peer, prompt[:16]), our_reply(model, prompt[:16], quantize)))
        how: dict[str, Any] = {"repeats": 20, "tokens": 4, "context": 16, "quantize": quantize, "kernels": "native"}
        facts[name]["bandwidth"] = decoding_speed(model, Memory(torch.device("cpu")), 1, **how)
        share = facts[name]["bandwidth"]["share_of_memory"]
        print(f"  reads {share['median']:.0%} of what memory gives ({share['least']:.0%} to {share['greatest']:.0%})")
    for rows, steps in ((8, 4), (64, 1)):
        decoding = Decoding(model, rows, CONTEXT, (REPEATS + 2) * steps)
        name = f"decode, {rows} rows, context {CONTEXT}"
        tell(facts, name, in_turns(their_rows(peer, prompt, rows, steps), our_rows(decoding, steps)))
    tell(facts, f"prompt of {PROMPT}", in_turns(their_prompt(peer), our_prompt(model)))
    c = model.config
    expanded = c.n_blocks * c.n_heads * (c.qk_head_dim + c.v_head_dim) * 2
    facts["cache_bytes_per_token"] = {"transformers": expanded, "nanollm": c.n_blocks * c.cache_width * 2}
    return facts


def tell(facts: dict[str, Any], name: str, compared: dict[str, dict[str, float]]) -> None:
    facts[name] = compared
    columns = [f"{side} {v['median']:8.2f} ({v['least']:.2f} to {v['greatest']:.2f})" for side, v in compared.items()]
    print(f"{name:<30}" + "   ".join(columns), flush=True)


def main(words: list[str]) -> int:
    facts = measure()
    print(
        json.dumps(
            {name: facts[name] for name in ("agreement", "matmul_gflop_per_s", "cache_bytes_per_token")}, indent=1
        )
    )
    if "--save" in words:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        record = {"benchmark": "inference", "commit": commit(), "hardware": hardware(), "versions": versions} | facts
        path = RESULTS / f"{datetime.date.today().isoformat()}_{hardware()['cores']}-cores_inference.json"
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
