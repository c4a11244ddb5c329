"""The metrics of a run: metrics.jsonl and optional trackers.

`metrics.jsonl` is always written: one JSON object per line, flushed, cut back on resume to the step it resumes from.
Trackers are optional and only ever receive the same numbers.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from nanollm.durable import sync, write_file
from nanollm.extras import missing_package

TrackerName = Literal["tensorboard", "wandb", "trackio"]
TIMED = ("tokens_per_s", "seconds", "peak_memory_gb", "rollout_s", "train_s")
"""Values of a line that no two runs share; all others are the same for the same settings on the same kind of CPU."""

Tracker = Callable[[int, Mapping[str, float]], None]


class RunLog:
    """The metrics of one run folder; without a folder, as of a process beside the main one, nothing is written."""

    def __init__(self, folder: Path | None, trackers: Sequence[Tracker] = (), *, resume_from: int = 0) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.trackers = trackers
        if self.path is not None and self.path.exists():
            told = _lines_up_to(self.path, resume_from) if resume_from else b""  # without a checkpoint it begins anew
            write_file(self.path, told)

    def write(self, step: int, **values: Any) -> None:
        """One line for `step`; values that are not finite are written as null, which JSON knows."""
        if self.path is None:
            return
        line: dict[str, Any] = {"step": step, **values}
        line |= {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker(step, numbers)

    def sync(self) -> None:
        """Wait until all lines are on the disk, as they must be before a checkpoint that comes after them."""
        if self.path is not None and self.path.exists():
            sync(self.path)


def _lines_up_to(path: Path, step: int) -> bytes:
    """The complete lines of steps up to `step`: what a killed run wrote after its last checkpoint is written again."""
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            is_later = not line.endswith(b"\n") or json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error!r}); remove that line to go on") from error
        if is_later:
            break
        kept.append(line)
    return b"".join(kept)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def start_tracker(name: TrackerName, folder: Path, settings: Mapping[str, Any], *, resume_from: int = 0) -> Tracker:
    """Open a tracker for this run, or go on with it. Its package comes with the extra `track`."""
    try:
        if name == "tensorboard":
            return _tensorboard(folder, resume_from)
        # The same folder is the same run; W&B finds it again by its id, Trackio by its name.
        own = sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        given = {"id": own, "dir": str(folder)} if name == "wandb" else {}
        run = import_module(name).init(
            project="nanollm", name=folder.name, config=dict(settings), resume="allow", **given
        )
    except ImportError as error:
        raise missing_package(f"tracker {name}", error.name, "track") from error
    return lambda step, values: run.log(dict(values), step=step)


def _tensorboard(folder: Path, resume_from: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1 if resume_from else None)

    def track(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track
