"""How does a run survive a kill at any byte, and go on as if nothing had happened?

A checkpoint is a folder `step-00000120` with the float32 masters and buffers (weights.safetensors), what the optimizers
remember (optimizer.safetensors) and the counters with the sha256 of both (state.json). It appears in one moment or not
at all; a damaged one is named and passed over. Nothing is unpickled.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from nanollm.durable import new_folder, sha256_of, write_json
from nanollm.progress import say
from nanollm.train.state import TrainState

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(folder: Path, state: TrainState, keep_last: int) -> Path:
    """Write the state as `folder/step-N` and delete all but the newest `keep_last` checkpoints."""
    path = folder / f"step-{state.step:08d}"
    with new_folder(path) as draft:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.weights().items()}, draft / WEIGHTS)
        save_file(_optimizer_tensors(state), draft / OPTIMIZER)
        counters = {"step": state.step, "loss_scale": state.loss_scale, "scale_age": state.scale_age}
        files = {name: sha256_of(draft / name) for name in (WEIGHTS, OPTIMIZER)}
        write_json(draft / STATE, {"counters": counters, "files": files, "sha256": _digest(counters, files)})
    for old in checkpoints(folder)[keep_last:]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.suffix == ""]
    return sorted(found, reverse=True)


def load_newest(folder: Path, state: TrainState) -> bool:
    """Put the newest undamaged checkpoint into the state; false if there is none."""
    for leftover in [*folder.glob("step-*.tmp"), *folder.glob("step-*.old")]:
        shutil.rmtree(leftover)
    for path in checkpoints(folder):
        try:
            counters = verify(path)
        except (ValueError, OSError) as error:
            say(f"passing over a damaged checkpoint: {error}")
            continue
        _load(path, counters, state)
        return True
    return False


def verify(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint whose every byte is as it was written; else a ValueError that names the file."""
    try:
        record = json.loads((path / STATE).read_bytes())
        counters, files = record["counters"], record["files"]
        intact = record["sha256"] == _digest(counters, files)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE} cannot be read ({error!r})") from error
    if not intact:
        raise ValueError(f"{path / STATE} was changed after it was written")
    for name, digest in files.items():
        if sha256_of(path / name) != digest:
            raise ValueError(f"{path / name} was changed after it was written")
    return dict(counters)


def _digest(counters: dict[str, Any], files: dict[str, str]) -> str:
    return sha256(json.dumps([counters, files], sort_keys=True).encode()).hexdigest()


def _load(path: Path, counters: dict[str, Any], state: TrainState) -> None:
    weights = load_file(path / WEIGHTS)
    expected = state.weights()
    if wrong := {n for n in weights.keys() | expected if n not in weights or n not in expected}:
        raise ValueError(f"{path} holds another model: {min(wrong)} is on one side only; choose another --out")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])
    remembered = load_file(path / OPTIMIZER)
    for optimizer, name, parameter in _named_slots(state):
        kinds = {key.rpartition(":")[2]: key for key in remembered if key.rpartition(":")[0] == name}
        optimizer.state[parameter] = {kind: remembered[key].to(parameter.device) for kind, key in kinds.items()}
    state.step, state.loss_scale = counters["step"], counters["loss_scale"]
    state.scale_age = counters["scale_age"]
    state.publish()


def _named_slots(state: TrainState) -> list[tuple[Optimizer, str, Tensor]]:
    """Every parameter that an optimizer moves, with its name."""
    names = {id(master): name for name, master in state.masters.items()}
    return [
        (optimizer, names[id(parameter)], parameter)
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """What the optimizers remember, as `parameter name:kind`."""
    return {
        f"{name}:{kind}": tensor.contiguous()
        for optimizer, name, parameter in _named_slots(state)
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }
