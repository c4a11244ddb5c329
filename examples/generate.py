"""Continue texts with a bundle: several at once, and one streamed.

  command   python examples/generate.py runs/example/pretrain/bundle
  before    python examples/train.py (or any other bundle)
  hardware  one CPU core
  time      seconds; half a minute the first time, to compile C++ for this processor

The engine takes and returns ids, so it works with any tokenizer.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from nanollm import Engine, Request, SamplingConfig, load_bundle
from nanollm.bundle import Bundle
from nanollm.text.chat import reply_ends
from nanollm.text.stream import TextStream

SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)


def request(bundle: Bundle, prompt: str, max_tokens: int, seed: int) -> Request:
    """A document begins with the <s> token; the reply depends on this request alone, not on others in the batch."""
    ids = [bundle.tokenizer.bos_id, *bundle.tokenizer.encode(prompt)]
    ends = reply_ends(bundle.tokenizer)
    return Request(prompt=ids, max_tokens=max_tokens, sampling=SAMPLING, stop_token_ids=ends, seed=seed)


def together(bundle: Bundle, prompts: list[str], max_tokens: int) -> list[str]:
    """The continuations of all prompts, sampled in one batch."""
    engine = Engine(bundle.model, rows=len(prompts))
    replies = [engine.submit(request(bundle, prompt, max_tokens, seed)) for seed, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    return [bundle.tokenizer.decode_drawn(reply.ids) for reply in replies]


def streamed(bundle: Bundle, prompt: str, max_tokens: int) -> Iterator[str]:
    """The same, streamed; never half a character."""
    engine, text = Engine(bundle.model, rows=1), TextStream(bundle.tokenizer)
    reply = engine.submit(request(bundle, prompt, max_tokens, seed=0))
    while engine.has_work:
        yield from (text.push(drawn.token) for drawn in engine.step() if drawn.token != reply.stop_token_id)
    yield text.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Continue texts.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", nargs="+", default=["The function", "Return the", "If the argument is"])
    parser.add_argument("--max_tokens", type=int, default=60)
    given = parser.parse_args()
    model = load_bundle(given.bundle)
    try:
        for prompt, text in zip(given.prompts, together(model, given.prompts, given.max_tokens), strict=True):
            print(f"{prompt}{text}\n{'-' * 40}")
        print(given.prompts[0], end="")
        for piece in streamed(model, given.prompts[0], given.max_tokens):
            print(piece, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:  # the reader (head, less) closed the pipe; discard the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
