"""Averages the newest checkpoints of a pretraining run into a bundle.

At a constant learning rate the mean of the last weights does what decaying the rate would do (LAWA, arXiv:2209.14981),
so such a run can be judged at any step, and go on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import __version__
from nanollm.bundle import FILES, is_bundle, save_bundle
from nanollm.config import check_at_least, parse_options, read_mapping
from nanollm.durable import check_replaceable, read_json
from nanollm.model.transformer import Transformer
from nanollm.progress import say
from nanollm.stages import pretrain
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.checkpoint import checkpoints, read_weights, verify
from nanollm.train.state import TrainState
from nanollm.world import World

POSITIONAL = ("run",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Average the newest checkpoints of a pretraining run into a bundle, the routers' bias included. At a
    constant rate (--optim.schedule wsd --optim.decay_fraction 0) a run can be judged so at any step, and goes on."""

    run: Path
    """Folder of the run, such as runs/nano-20m."""
    last: int = 8
    """Checkpoints to average, the newest ones, best those of the last third of the run. The run must keep as many
    (--train.keep_last)."""
    out: Path | None = None
    """Folder of the bundle; null: average in the folder of the run."""
    force: bool = False
    """Replace an existing bundle at --out."""

    def __post_init__(self) -> None:
        check_at_least(2, self, "last", prefix="--")

    @property
    def folder(self) -> Path:
        return self.out or self.run / "average"


def run(c: Config) -> Path:
    """The folder of the bundle."""
    settings = c.run / "config.yaml"
    if not settings.is_file() or "model" not in read_mapping(settings):
        raise ValueError(f"{c.run} is not the folder of a run of nanollm pretrain")
    check_replaceable(c.folder, FILES if is_bundle(c.folder) else (), force=c.force, what="a bundle")
    found = checkpoints(c.run / "checkpoints")[: c.last]
    if len(found) < c.last:
        raise ValueError(
            f"{c.run} has {len(found)} checkpoints, --last is {c.last}; a run keeps as many as --train.keep_last says"
        )
    trained, _ = parse_options("pretrain", pretrain, [f"--config={settings}"])
    counters = [verify(path) for path in found]
    state = TrainState.start(
        Transformer(trained.model),
        trained.optim,
        World.start("cpu", "float32"),
        pretrain.UNIT_ROWS[trained.start],
        trained.train.int4_from,
    )
    state.step = int(counters[0]["step"])
    means = read_weights(found[0])
    for number, path in enumerate(found[1:], start=2):
        for name, weights in read_weights(path).items():
            means[name].lerp_(weights, 1 / number)
    with torch.no_grad():
        for name, weights in state.weights().items():
            weights.copy_(means[name])
    steps = [int(each["step"]) for each in counters]
    say(f"the mean of {len(found)} checkpoints, steps {steps[-1]:,} to {steps[0]:,}")
    provenance = {
        "made_by": f"nanollm {__version__} average, torch {torch.__version__}",
        "config": read_mapping(settings),
        "inputs": read_json(c.run / "inputs.json"),
        "steps": steps,
    }
    tokenizer = Tokenizer.load(trained.tokenizer_path)
    return save_bundle(c.folder, trained.model, state.bundle_weights(), tokenizer, provenance)
