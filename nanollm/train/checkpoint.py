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
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from nanollm.bundle import write_tensors
from nanollm.durable import new_folder, settle, sha256_of, write_json
from nanollm.progress import say
from nanollm.train.state import TrainState

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(folder: Path, state: TrainState, keep_last: int) -> Path:
    """Write the state as `folder/step-N` and delete all earlier checkpoints but the newest `keep_last - 1`."""
    path = folder / f"step-{state.step:08d}"
    with new_folder(path) as draft:
        write_tensors(draft / WEIGHTS, state.weights())
        write_tensors(draft / OPTIMIZER, _optimizer_tensors(state))
        counters = {"step": state.step, "loss_scale": state.loss_scale, "scale_age": state.scale_age}
        files = {name: sha256_of(draft / name) for name in (WEIGHTS, OPTIMIZER)}
        write_json(draft / STATE, {"counters": counters, "files": files, "sha256": _digest(counters, files)})
    earlier = [old for old in checkpoints(folder) if old.name < path.name]
    for old in earlier[keep_last - 1 :]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, newest first, sound or not; those that were found damaged have another name."""
    return sorted((path for path in folder.glob("step-*") if path.suffix == ""), reverse=True)


def load_newest(folder: Path, state: TrainState) -> bool:
    """Put the newest sound checkpoint into the state; false if there never was one.

    Newer ones that are damaged are said and renamed to step-N.damaged. ValueError if there are only damaged ones.
    """
    for leftover in [*folder.glob("step-*.tmp"), *folder.glob("step-*.old")]:
        settle(leftover.with_suffix(""))
    damaged: list[Path] = []
    for path in checkpoints(folder):
        try:
            counters = verify(path)
        except (ValueError, FileNotFoundError) as error:
            say(f"passing over a damaged checkpoint: {error}")
            damaged.append(path)
            continue
        _load(path, counters, state)
        for bad in damaged:
            bad.rename(bad.with_suffix(".damaged"))
        return True
    if damaged:
        raise ValueError(f"every checkpoint in {folder} is damaged; bring back a copy, or remove it to begin anew")
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
        optimizer.state[parameter] = {kind: remembered[key].clone().to(parameter.device) for kind, key in kinds.items()}
    state.step = counters["step"]
    if state.scales_loss and counters["loss_scale"] > 1:  # not so if the run began in another type
        state.loss_scale, state.scale_age = counters["loss_scale"], counters["scale_age"]
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
