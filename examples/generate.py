"""Continue texts with a bundle: several at once, and one streamed.

  command   python examples/generate.py runs/example/pretrain/bundle
  before    python examples/train.py (or any other bundle)
  hardware  one CPU core
  time      seconds; half a minute the first time, to compile C++ for this processor

A model that has learned to reply answers with `model.chat`.
"""

import argparse
import os
from pathlib import Path

import nanollm

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Continue texts.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", nargs="+", default=["The function", "Return the", "If the argument is"])
    parser.add_argument("--max_tokens", type=int, default=60)
    given = parser.parse_args()
    model, settings = nanollm.load(given.bundle), {"max_tokens": given.max_tokens, "top_p": 0.95}
    try:
        for prompt, text in zip(given.prompts, model.generate(given.prompts, **settings), strict=True):
            print(f"{prompt}{text}\n{'-' * 40}")
        print(given.prompts[0], end="")
        for piece in model.stream(given.prompts[0], is_chat=False, **settings):
            print(piece, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:  # the reader (head, less) closed the pipe; discard the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
