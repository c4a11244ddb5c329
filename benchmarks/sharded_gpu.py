"""Cost of FSDP2 on one GPU, and how long a save keeps training waiting.

The same steps of `nanollm pretrain` in one process as it trains alone, and as the only rank of a mesh (NCCL): what is
gathered, cast and reduced for others is done, only nothing travels. Then a save: the wait until training goes on, and
until the checkpoint is on the disk.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import in_turns, seconds, spread_of
from benchmarks.train_gpu import steps_of
from benchmarks.train_step import shape_of

if TYPE_CHECKING:
    from nanollm.model.config import ModelConfig
    from nanollm.world import World

NEEDS_GPU = True
MESHES = {"ddp": (1, 1), "fsdp": (1,)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="turns, in each of which every side is measured once")
    parser.add_argument("--preset", default="nano-327m", help="model of configs/model/")
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="speed.compile")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from nanollm.world import World

    if not torch.cuda.is_available():
        raise ValueError("this benchmark needs a CUDA device, found none")
    device = torch.device("cuda", 0)
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=device)
    alone, c = World.start("cuda"), shape_of(options.preset, options.context)
    saving = distributed.new_group(backend="gloo")
    worlds = {"alone": alone}
    for name, shape in MESHES.items():
        mesh = init_device_mesh("cuda", shape, mesh_dim_names=("copy", "part")[-len(shape) :])
        worlds[name] = dataclasses.replace(alone, device=device, mesh=mesh, saving=saving)
    sides = {name: steps_of("experts", c, world, options) for name, world in worlds.items()}
    tokens = options.rows * options.context
    facts = in_turns(
        {name: lambda run=run: options.steps * tokens / seconds(run) for name, run in sides.items()},  # type: ignore[misc]
        options.repeats,
        warm_up=True,
    )
    sides.clear()
    torch.cuda.empty_cache()
    saves = [saved(c, worlds["fsdp"]) for _ in range(3)]
    distributed.destroy_process_group()
    held = {name: spread_of([save[name] for save in saves]) for name in saves[0]}
    return {"unit": "tokens/s", **facts, "save_s": held, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def saved(c: "ModelConfig", world: "World") -> dict[str, float]:
    """Seconds that training waits for a save, and until it is done."""
    from nanollm.model.transformer import Transformer
    from nanollm.train.checkpoint import Checkpoints
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState

    state = TrainState.start(Transformer(c).init(0).to(world.device), OptimConfig(), world)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), 1, world)
        waited = seconds(lambda: checkpoints.save(state))
        return {"training_waits": waited, "until_it_is_done": waited + seconds(checkpoints.wait)}
