"""Whose folder is it: does the run that starts here go on with the one that was begun?

A run keeps its resolved settings (config.yaml), the fingerprints of what it reads (inputs.json) and when and where it
was started (starts.jsonl) in its folder. Of several processes the main one writes all this; all of them read the
checkpoints, so the folder must be one they share.
"""

import json
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch

from nanollm import __version__
from nanollm.bundle import save_bundle
from nanollm.durable import check_writable, lock_folder, read_json, write_file, write_json
from nanollm.model.config import ModelConfig
from nanollm.origin import commit, hardware
from nanollm.progress import say
from nanollm.settings import read_mapping, to_yaml
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.checkpoint import checkpoints, load_newest
from nanollm.train.runlog import RunLog, TrackerName, start_tracker
from nanollm.train.state import TrainState
from nanollm.world import World

STARTS = "starts.jsonl"


@contextmanager
def hold_folder(out: Path, world: World) -> Iterator[None]:
    """Keep other jobs out of the folder of a run (--out) while the block runs."""
    check_writable(out, "--out")
    with lock_folder(out) if world.is_main else nullcontext():
        yield


def open_run(
    out: Path,
    settings: Mapping[str, object],
    inputs: Mapping[str, object],
    fixed: Collection[str],
    make_state: Callable[[], TrainState],
    trackers: Sequence[TrackerName],
    world: World,
) -> tuple[TrainState, RunLog]:
    """Claim the folder, make the state, go on from its newest checkpoint if it has one, and open its log."""
    check_same_everywhere(settings, inputs, world)
    if world.is_main:
        claim_folder(out, settings, inputs, fixed)
    state = make_state()
    if load_newest(out / "checkpoints", state, world):
        say(f"going on from step {state.step:,} in {out}")
    if not world.is_main:
        return state, RunLog.mute()
    note_start(out, state.step, world)
    started = [start_tracker(name, out, settings, resume_from=state.step) for name in trackers]
    return state, RunLog(out, started, resume_from=state.step)


def note_start(out: Path, step: int, world: World) -> None:
    """One more line of starts.jsonl: when, from which step, and with which code on which machine."""
    start = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "nanollm": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processes": world.size,
        **hardware(),
    }
    path = out / STARTS
    before = path.read_bytes() if path.exists() else b""
    write_file(path, before + json.dumps(start).encode() + b"\n")


def save_run_bundle(
    out: Path,
    config: ModelConfig,
    state: TrainState,
    tokenizer: Tokenizer,
    provenance: Mapping[str, object],
    world: World,
) -> Path:
    """Write what the run made as its bundle, once, and return the folder."""
    weights, folder = state.bundle_weights(keep=world.is_main), out / "bundle"
    if world.is_main:
        save_bundle(folder, config, weights, tokenizer, provenance)
    return folder


def check_same_everywhere(settings: Mapping[str, object], inputs: Mapping[str, object], world: World) -> None:
    """Raises ValueError where processes, perhaps on different hosts, were started to do different things."""
    first, *others = world.gather(flat({**settings, "inputs": inputs}))
    for rank, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            if (ours := first.get(key)) != (theirs := other.get(key)):
                raise ValueError(
                    f"all processes of a job need the same settings and data: {key} is {ours} on rank 0 and {theirs} "
                    f"on rank {rank}; start every host with the same command"
                )


def claim_folder(
    out: Path, settings: Mapping[str, object], inputs: Mapping[str, object], fixed: Collection[str]
) -> None:
    """Write config.yaml and inputs.json, or hold this run to those that are there.

    `fixed` names what decides which numbers come out at which step, as dotted keys of the settings, and "inputs" for
    the fingerprints; a change there is a ValueError. The rest may change on the way, and is said.
    """
    config_file, inputs_file = out / "config.yaml", out / "inputs.json"
    if checkpoints(out / "checkpoints") and not (config_file.exists() and inputs_file.exists()):
        raise ValueError(f"{out} has checkpoints but not both config.yaml and inputs.json; choose another --out")
    if config_file.exists() and inputs_file.exists():
        known = read_json(inputs_file, "bring back a copy, or choose another --out")
        before = flat(read_mapping(config_file) | {"inputs": known})
        now = flat({**settings, "inputs": inputs})
        _check_same_run(out, before, now, fixed)
    write_json(inputs_file, inputs)
    write_file(config_file, to_yaml(settings).encode())


def _check_same_run(folder: Path, old: dict[str, str], new: dict[str, str], fixed: Collection[str]) -> None:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    for key in changed:
        if any(f"{key}.".startswith(f"{name}.") for name in fixed):
            was, now = (str(values.get(key))[: 6 if key.startswith("inputs.") else None] for values in (old, new))
            raise ValueError(
                f"{folder} was begun with {key} = {was}, this run has {now}; "
                f"go on with the old value or choose another --out"
            )
    for key in changed:
        say(f"{folder} goes on with {key} = {new.get(key)} instead of {old.get(key)}")


def flat(mapping: object, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys, and values as text that is the same from YAML and from a dataclass."""
    if isinstance(mapping, Mapping):
        return {k: v for key, inner in mapping.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): str(_plain(mapping))}


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.as_posix() if isinstance(value, Path) else value
