"""Memory of a training step: all logits at once against ours, and what `nanollm info` says of it.

Each measurement is a process of its own: the peak of its resident set over three steps, less what it had after the
imports and the steps of a tiny model (the libraries' own memory). AdamW, full-length sequences, the compute type of
this machine. The naive side makes the logits (B, T, V), copies them to float32 and hands them to F.cross_entropy.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, in_turns, memory_gb, peak_memory_gb

PRESETS = {"nano-1m": 32, "nano-5m": 16, "nano-20m": 4, "nano-60m": 2, "nano-327m": 1}
"""Sequences per step, about as many as fit a laptop's minutes."""
STEPS = 3  # the second is the first with all that the optimizer remembers; the third uses memory that was freed
TINY = "nano-1m"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="which models")
    parser.add_argument("--sequences", type=int, help="per step, for all of them (default: by preset)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: the preset's context)")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter, with Muon (only ours)")
    parser.add_argument("--recompute", action="store_true", help="keep what enters each block only (ours)")
    parser.set_defaults(repeats=1)  # the same work takes the same memory


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from nanollm.world import World

    dtype = World.start(device="cpu").names["dtype"]
    return {
        "unit": "MB (1e6 bytes) at the peak of a training step",
        "dtype": dtype,
        "presets": {name: _facts(name, dtype, options) for name in options.presets},
    }


def _facts(name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    sequences = options.sequences or PRESETS[name]
    case = {"preset": name, "sequences": sequences, "length": options.length, "optimizer": options.optimizer}
    case |= {"dtype": dtype, "recompute": options.recompute, "lora": options.lora}
    case |= {"optimizer": "muon"} if options.lora else {}
    losses: dict[str, float] = {}
    sides = {
        side: partial(_peak_mb, side, case | {"lora": None} if side == "naive" else case, losses)
        for side in ("naive", "nanollm")
    }
    facts = in_turns(sides, options.repeats)
    predicted = _predicted_mb(case)
    return facts | {
        "sequences": sequences,
        "predicted": predicted,
        "predicted_over_measured": predicted / facts["sides"]["nanollm"]["median"],
        "checks": {"relative_difference_of_the_losses": abs(losses["naive"] / losses["nanollm"] - 1)},
    }


def _predicted_mb(case: dict[str, Any]) -> float:
    import torch

    from nanollm.kernels import attention as fused
    from nanollm.model.lora import LoraConfig
    from nanollm.train.memory import lora_memory, training_memory

    c = _config(case)
    predict = partial(training_memory, optimizer=case["optimizer"])
    if case["lora"]:
        predict = partial(lora_memory, lora=LoraConfig(rank=case["lora"]))
    return (
        predict(
            c,
            sequences=case["sequences"],
            compute_bytes=4 if case["dtype"] == "float32" else 2,
            recompute=case["recompute"],
            is_fused=fused.fits(*c.head_widths, getattr(torch, case["dtype"]), torch.device("cpu")),
        ).total
        / 1e6
    )


def _peak_mb(side: str, case: dict[str, Any], losses: dict[str, float]) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(case | {"side": side})]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    facts = json.loads(done.stdout)
    losses[side] = facts["loss"]
    return float(facts["peak_mb"])


# --- in the process that is measured ---


def _config(case: dict[str, Any]) -> Any:
    from nanollm.config import load_preset
    from nanollm.model.config import ModelConfig

    values = load_preset("model", case["preset"])
    return ModelConfig(**(values | ({"context_length": case["length"]} if case["length"] else {})))


def _steps(case: dict[str, Any]) -> float:
    """Train a few steps; returns the last loss."""
    import torch
    from torch.nn import functional as F

    from nanollm.data.batches import IGNORE, Batch
    from nanollm.model.lora import LoraConfig, add_lora
    from nanollm.model.transformer import Transformer
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState
    from nanollm.train.step import train_step
    from nanollm.world import World

    def naive(model: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(batch.tokens, positions=batch.positions).flatten(0, 1).float()
        loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss, loss.detach()

    c, optim = _config(case), OptimConfig(name=case["optimizer"])
    model = Transformer(c).init(0)
    add_lora(model, LoraConfig(rank=case["lora"]), seed=0)
    state = TrainState.start(model, optim, World(dtype=getattr(torch, case["dtype"])))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(c.vocab_size, (case["sequences"], c.context_length + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss_of = naive if case["side"] == "naive" else partial(next_token_loss, recompute=case["recompute"])
    return [train_step(state, [batch], loss_of, 1e-3, optim, World()).loss for _ in range(STEPS)][-1]


def _child(case: dict[str, Any]) -> dict[str, float]:
    _steps(case | {"preset": TINY, "sequences": 1, "length": 64})
    before = memory_gb()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    loss = _steps(case)
    return {"peak_mb": 1000 * (peak_memory_gb() - before), "loss": loss}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
