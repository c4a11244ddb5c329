"""Checkpoints that survive a kill at any byte and resume to the same bits.

A checkpoint is a folder `step-00000120` with the float32 masters and buffers, what the optimizers remember (as
`parameter name:kind`), and the counters with the sha256 of every other file (state.json). It appears in one moment or
not at all; a damaged one is named and passed over. Nothing is unpickled.

One process writes two files, weights.safetensors and optimizer.safetensors. Of several each writes its parts into a
file of its own, through torch.distributed.checkpoint; training goes on meanwhile, and the folder takes its name only
when all files are on the disk. Any number of processes in any parallel mode reads either.
"""

import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from nanollm.bundle import check_header, write_tensors
from nanollm.durable import new_folder, put_in_place, read_sealed_json, recover, sha256_of, write_sealed_json
from nanollm.progress import say
from nanollm.train.state import TrainState
from nanollm.world import World

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 2  # of state.json


class Checkpoints:
    """Those of a run, written beside training where there are several processes. All ranks call the same methods."""

    def __init__(self, folder: Path, keep_last: int, world: World) -> None:
        self.folder, self.keep_last, self.world = folder, keep_last, world
        self._finishers = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def delete_older(self) -> None:
        """Delete what a save that was killed at its very end did not come to; the newest must be sound."""
        if self.world.is_main and (found := checkpoints(self.folder)):
            _delete_older(found[0], self.keep_last)

    def save(self, state: TrainState) -> None:
        """Begin to save the state as it is now; raises what went wrong with the save before."""
        self.wait()
        if self.world.saving is None:
            save_checkpoint(self.folder, state, self.keep_last)
            return
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        path = self.folder / f"step-{state.step:08d}"
        draft = path.with_name(path.name + ".tmp")
        writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
        tensors = state.weights() | _optimizer_tensors(state)
        writing = async_save(tensors, storage_writer=writer, process_group=self.world.saving)
        assert isinstance(writing, Future)
        self._pending = self._finishers.submit(self._finish, writing, path, draft, _counters(state))

    def _finish(self, writing: Future[Any], path: Path, draft: Path, counters: dict[str, Any]) -> None:
        _written(writing)  # by all ranks
        if self.world.is_main:
            _sign(draft, counters)
            put_in_place(draft, path)
            _delete_older(path, self.keep_last)

    def wait(self) -> None:
        """Until what was begun is safe on the disk, for all ranks; what went wrong is raised by each of them."""
        if self._pending is None:
            return
        error, self._pending = self._pending.exception(), None
        failed = {rank: told for rank, told in enumerate(self.world.all_gather(error and str(error))) if told}
        if error is not None:
            raise error
        for rank, told in failed.items():
            raise OSError(f"rank {rank} could not save: {told}")


def _written(writing: Future[Any]) -> None:
    """Wait for every rank's files; OSError with the first reason why a rank could not write its own."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        writing.result()
    except CheckpointException as error:
        for rank, (cause, _) in sorted(error.failures.items()):
            if isinstance(cause, OSError):
                raise OSError(cause.errno, f"rank {rank} could not save: {cause.strerror}", cause.filename) from error
            raise OSError(f"rank {rank} could not save: {cause!r}") from error


def save_checkpoint(folder: Path, state: TrainState, keep_last: int) -> Path:
    """Write the state as `folder/step-N` and delete all earlier checkpoints but the newest `keep_last - 1`."""
    path = folder / f"step-{state.step:08d}"
    with new_folder(path) as draft:
        write_tensors(draft / WEIGHTS, state.weights())
        write_tensors(draft / OPTIMIZER, _optimizer_tensors(state))
        _sign(draft, _counters(state))
    _delete_older(path, keep_last)
    return path


def _counters(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "loss_scale": state.loss_scale,
        "scale_age": state.scale_age,
        "losses": state.losses,
    }


def _sign(draft: Path, counters: dict[str, Any]) -> None:
    """Write down the counters, and what all files are."""
    files = {file.name: sha256_of(file) for file in sorted(draft.iterdir())}
    write_sealed_json(draft / STATE, {"format": FORMAT, "counters": counters, "files": files})


def _delete_older(path: Path, keep_last: int) -> None:
    earlier = [old for old in checkpoints(path.parent) if old.name < path.name]
    for old in earlier[keep_last - 1 :]:
        # Under the name of a draft first: whatever stops the deletion, no half checkpoint is seen.
        shutil.rmtree(old.rename(old.with_suffix(".tmp")))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, newest first, sound or not; those that were found damaged have another name."""
    return sorted((path for path in folder.glob("step-*") if path.suffix == ""), reverse=True)


def load_newest(folder: Path, state: TrainState, world: World) -> bool:
    """Put the newest sound checkpoint into the state; false if there never was one. All ranks must call it.

    Newer ones that are damaged are said and renamed to step-N.damaged. ValueError if there are only damaged ones.
    """
    found = world.broadcast(find_newest(folder) if world.is_main else None)
    if found is None:
        return False
    _load(*found, state)
    return True


def find_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its counters; what a killed save left is removed."""
    for leftover in [*folder.glob("step-*.tmp"), *folder.glob("step-*.old")]:
        recover(leftover.with_suffix(""))
    damaged: list[Path] = []
    for path in checkpoints(folder):
        try:
            counters = verify(path)
        except (ValueError, FileNotFoundError) as error:
            say(f"passing over a damaged checkpoint: {error}")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.rename(bad.with_suffix(".damaged"))
        return path, counters
    if damaged:
        raise ValueError(f"every checkpoint in {folder} is damaged; bring back a copy, or remove it to begin anew")
    return None


def verify(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint whose every byte is as it was written; else a ValueError that names the file."""
    if not (path / STATE).is_file():
        raise FileNotFoundError(f"{path / STATE} is missing")
    record = read_sealed_json(path / STATE, FORMAT, "bring back a copy")
    if record.get("format") != FORMAT:
        found = record.get("format")
        raise ValueError(
            f"{path / STATE}: expected format {FORMAT}, got {found!r}; resume with the version of nanollm that wrote it"
        )
    try:
        counters, files = dict(record["counters"]), dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE} cannot be read ({error!r})") from error
    if wrong := {"step", "loss_scale", "scale_age"} - {name for name, n in counters.items() if type(n) in (int, float)}:
        raise ValueError(f"{path / STATE} has no number {min(wrong)}")
    if strangers := {file.name for file in path.glob("*.safetensors")} - set(files):
        raise ValueError(f"{path / min(strangers)} is not of this checkpoint")
    for name, digest in files.items():
        if Path(name).name != name:  # its bytes would be read, wherever it is
            raise ValueError(f"{path / STATE} names {name!r}, which is no file of the checkpoint")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing")
        if sha256_of(path / name) != digest:
            raise ValueError(f"{path / name} was changed after it was written")
    return counters


def _load(path: Path, counters: dict[str, Any], state: TrainState) -> None:
    """Each rank reads what it holds, from whichever files it lies in."""
    kept = _entries(path)
    weights = state.weights()
    shapes = {name: tuple(entry.size) for name, entry in kept.items() if ":" not in name}
    expected = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := {name for name in shapes | expected if shapes.get(name) != expected.get(name)}:
        name = min(wrong)
        raise ValueError(
            f"{path} holds another model: {name} has shape {shapes.get(name, 'nothing')} there and "
            f"{expected.get(name, 'nothing')} here; choose another --out"
        )
    for name, entry in kept.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise ValueError(f"{path} lacks a part of {name}; bring back the file, or another checkpoint")
    slots = dict[str, Tensor]()
    for optimizer, name, parameter in _named_slots(state):
        kinds = {key.rpartition(":")[2]: entry for key, entry in kept.items() if key.rpartition(":")[0] == name}
        optimizer.state[parameter] = {kind: _room(entry, parameter) for kind, entry in kinds.items()}
        slots |= {f"{name}:{kind}": room for kind, room in optimizer.state[parameter].items()}
    _read(path, {**weights, **slots})
    state.step, state.losses = counters["step"], counters.get("losses", [])  # older checkpoints have none
    if state.scales_loss and counters["loss_scale"] > 1:  # not so if the run began in another type
        state.loss_scale, state.scale_age = counters["loss_scale"], counters["scale_age"]
    state.copy_to_model()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The float32 masters and buffers of a checkpoint, whole, by the names of the model's state_dict."""
    kept = _entries(path)
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in kept.items() if ":" not in name
    }
    _read(path, weights)
    return weights


def _entries(path: Path) -> dict[str, Any]:
    """What is in the files of a checkpoint, by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    for file in path.glob("*.safetensors"):
        check_header(file)
    try:
        return dict(HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no tensors that can be read ({error!r}); choose another --out") from error


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors, or the parts of them that this rank holds, from whichever files they lie in."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # every rank reads for itself
        load({**tensors}, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _room(entry: Any, parameter: Tensor) -> Tensor:
    """An empty tensor for what an optimizer remembers of a parameter: cut as that is, or a number of its own."""
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=parameter.device)


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
        f"{name}:{kind}": tensor
        for optimizer, name, parameter in _named_slots(state)
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }
