"""How is a variant trained, on which text? By the package's own pieces, one step at a time.

Torch is imported where it is needed: whoever only starts other processes does not wait for it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from benchmarks.variants import Variant
    from nanollm.data.batches import Windows
    from nanollm.data.shards import Shards
    from nanollm.evals.bits_per_byte import BitsPerByte
    from nanollm.model.config import ModelConfig
    from nanollm.text.tokenizer import Tokenizer
    from nanollm.train.state import TrainState
    from nanollm.train.step import StepStats
    from nanollm.world import World

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "openwebtext"
PREPARED = Path.home() / ".cache" / "nanollm" / "ablations"


def prepare(corpus: Path, prepared: Path, pieces: int) -> None:
    """Tokenizer and token files of a size, unless they are there."""
    tokenizer, data = prepared / f"tokenizer-{pieces}", prepared / f"owt-{pieces}"
    if (data / "manifest.json").exists():
        return
    if not corpus.is_dir():
        raise ValueError(f"{corpus} is not a folder of Parquet files with a column `text`; name one with --corpus")
    nanollm = [sys.executable, "-m", "nanollm"]
    learn = ["tokenizer", "--corpus", str(corpus), "--output_dir", str(tokenizer), "--vocab_size", str(pieces)]
    encode = ["preprocess", "owt", "--input", str(corpus), "--tokenizer_path", str(tokenizer), "--save_dir", str(data)]
    for words in (learn, encode):
        subprocess.run([*nanollm, *words], check=True)


def equal_bytes(prepared: Path, pieces: int) -> float:
    """Tokens of a tokenizer over those of 4,096 pieces that hold as many bytes of the training text."""
    per_byte = []
    for size in (pieces, 4096):
        split = json.loads((prepared / f"owt-{size}" / "manifest.json").read_bytes())["splits"]["train"]
        per_byte.append(split["tokens"] / split["text_bytes"])
    return per_byte[0] / per_byte[1]


@dataclass(frozen=True)
class Text:
    """A tokenizer and the text it was prepared for."""

    tokenizer: "Tokenizer"
    train: "Shards"
    val: "Shards"

    @classmethod
    def open(cls, prepared: Path, pieces: int) -> "Text":
        from nanollm.data.shards import Shards
        from nanollm.text.tokenizer import Tokenizer

        tokenizer, folder = Tokenizer.load(prepared / f"tokenizer-{pieces}"), prepared / f"owt-{pieces}"
        splits = (Shards.open(folder, s, tokenizer_fingerprint=tokenizer.fingerprint) for s in ("train", "val"))
        return cls(tokenizer, *splits)


@dataclass(frozen=True)
class Run:
    """A variant in training, by the package's own pieces."""

    variant: "Variant"
    state: "TrainState"
    text: Text
    windows: "Windows"
    world: "World"

    @classmethod
    def start(cls, v: "Variant", config: "ModelConfig", seed: int, text: Text, world: "World") -> "Run":
        from benchmarks.variants import build_optimizers
        from nanollm.data.batches import TextShards, Windows
        from nanollm.data.order import Mixture
        from nanollm.train.state import TrainState

        state = TrainState.start(v.build(config, seed), v.optim, world)
        state.optimizers = build_optimizers(state.masters, v.optim, v.tuning, world.dtype)
        windows = Windows([TextShards(text.train, config.context_length)], Mixture([1.0]), seed)
        return cls(v, state, text, windows, world)

    def step(self, step: int, steps: int) -> "StepStats":
        """Optimizer step number `step` of a run of `steps`."""
        from nanollm.train.loss import next_token_loss
        from nanollm.train.optim import Muon, lr_at
        from nanollm.train.step import train_step

        v = self.variant
        for optimizer in self.state.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.param_groups[0]["momentum"] = v.tuning.momentum_at(step, v.optim)
        loss_of = partial(next_token_loss, balance_weight=v.optim.balance_weight)
        batches = self.windows.micro_batches(step, v.batch_size, v.batch_size)
        with loss_through_head(v):
            return train_step(self.state, batches, loss_of, lr_at(step, steps, v.optim), v.optim, self.world)

    def validate(self, windows: int | None) -> "BitsPerByte":
        """Bits per byte of that many windows of the validation split, always the same; None: of all."""
        from nanollm.data.batches import sequential_batches
        from nanollm.evals.bits_per_byte import bits_per_byte

        batches = sequential_batches(self.text.val, self.windows.splits[0].context_length, 8, windows)
        with loss_through_head(self.variant):
            return bits_per_byte(self.state.model, batches, self.text.tokenizer.token_bytes)


@contextmanager
def loss_through_head(v: "Variant") -> Iterator[None]:
    """The package's loss multiplies with the head's weight itself; a head of another kind must be called."""
    from benchmarks.variants import head_cross_entropy_sum

    with ExitStack() as stack:
        if v.calls_head:
            for module in ("nanollm.train.loss", "nanollm.evals.bits_per_byte"):
                stack.enter_context(patch(f"{module}.cross_entropy_sum", head_cross_entropy_sum))
        yield
