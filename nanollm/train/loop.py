"""In which order do things happen in a run?

Straight down the page: a step, its numbers, now and then a look at validation text, a sample, a checkpoint. The
evaluations are handed in; this file knows neither text nor files of data.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from types import FrameType
from typing import Protocol, TypeVar

import torch

from nanollm.progress import Progress, say
from nanollm.train.checkpoint import Checkpoints
from nanollm.train.memory import peak_memory
from nanollm.train.runlog import RunLog
from nanollm.train.state import TrainState
from nanollm.world import World

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, and how often to look, log and save."""

    steps: int
    """Steps in all."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    validate_every: int = 100
    """Steps between two looks at what is not trained on (0: only at the start and the end)."""
    sample_every: int = 0
    """Steps between two samples (0: only at the start and the end)."""
    save_every: int = 200
    """Steps between two checkpoints (0: only at the end and when interrupted)."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("validate_every", "sample_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How long, in which portions, and how often to look, log and save."""

    batch_size: int = 32
    """Sequences per optimizer step."""
    micro_batch_size: int = 8
    """Sequences per forward pass; must divide batch_size. Smaller takes less memory and gives the same step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.batch_size must be a multiple of train.micro_batch_size ({self.micro_batch_size}), "
                f"got {self.batch_size}"
            )


class Taken(Protocol):
    """What a step tells the loop."""

    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def tokens(self) -> int:
        """Trained tokens."""

    @property
    def skipped(self) -> bool:
        """Something was not finite, or an outlier, and the weights stayed as they were."""

    @property
    def note(self) -> str:
        """A few words for the progress line."""

    def values(self) -> dict[str, object]:
        """Names and values for the log."""


Outcome = TypeVar("Outcome")

Naming = Callable[[int], dict[str, object]]
"""What a step sees: how its parts are called, and the numbers of all of them."""

Check = Callable[[], dict[str, object]]
"""An evaluation of the model as it stands: names and values for the log."""


def fit(
    state: TrainState,
    take_step: Callable[[int], Taken],
    c: LoopConfig,
    folder: Path,
    log: RunLog,
    validate: Check,
    sample: Check,
    batch_of: Naming,
    world: World,
) -> None:
    """Train from `state.step` to `c.steps`; `take_step(step)` depends on the weights and the step alone.

    An update that was skipped is said, and metrics.jsonl names all that its step saw, as `batch_of(step)` tells.

    SIGINT and SIGTERM save after the step at hand and leave with exit code 130 or 143; a second one leaves at once.
    Of several processes all do the same at the same step, whichever of them got the signal.
    """
    checkpoints = Checkpoints(folder / "checkpoints", c.keep_last, world)
    checkpoints.delete_older()
    clock, watch = _Clock(world.device), _Watch()

    def save() -> None:
        log.sync()
        checkpoints.save(state)

    with _signals(world) as received, Progress("train", c.steps, "steps", done=state.step) as bar:
        if state.step == 0:
            log.write(0, **clock.paused(validate), **clock.paused(sample))
        while state.step < c.steps:
            if number := int(world.largest(received[0] if received else 0)):
                save()
                checkpoints.wait()
                say(f"saved step {state.step} after {signal.Signals(number).name}; the same command goes on from here")
                raise SystemExit(128 + number)

            try:
                stats = take_step(state.step)
            except ValueError:  # a step that cannot be taken must not cost those before it
                if state.step and world.size == 1:  # the others may well be able to take it
                    save()
                raise
            batch = batch_of(state.step) if stats.skipped else {}
            state.step += 1
            clock.count(stats.tokens)
            bar.advance()
            bar.note(stats.note)

            at_end = state.step == c.steps
            values: dict[str, object] = stats.values() | {"batch": batch} if batch else {}
            if _due(state.step, c.log_every) or at_end:
                values |= stats.values() | clock.read()
            if _due(state.step, c.validate_every) or at_end:
                values |= clock.paused(validate)
            if _due(state.step, c.sample_every) or at_end:
                values |= clock.paused(sample)
            if values:
                log.write(state.step, **values)
            watch.see(state.step, stats, batch)
            if _due(state.step, c.save_every) or at_end:
                clock.paused(save)
        checkpoints.wait()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Watch:
    """Says which updates were skipped, and ends a run in which nothing but that happens."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def see(self, step: int, stats: Taken, batch: dict[str, object]) -> None:
        self._in_a_row = self._in_a_row + 1 if stats.skipped else 0
        if not stats.skipped:
            return
        saw = shorten(", ".join(f"{name} {value}" for name, value in batch.items()), 300)
        say(
            f"step {step}: loss {stats.loss}, gradient norm {stats.grad_norm}: the update was skipped; "
            f"the step saw {saw}"
        )
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"the updates of steps {step - self._in_a_row + 1} to {step} were all skipped, for numbers that were "
                f"not finite or far above those before, and the run stopped; metrics.jsonl names what each saw, the "
                f"last {saw}. The checkpoints are finite but may hold weights that had already run away: begin anew in "
                f"another --out with a lower optim.lr, or look at that text; if such losses are right, go on with "
                f"--optim.spike_sigmas 0"
            )


class _Clock:
    """Tokens per second of training alone: validation, samples and saving stop the clock; `seconds` has them in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start, self._paused, self._tokens = time.perf_counter(), 0.0, 0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self) -> dict[str, object]:
        """What the time since the last reading was like."""
        now = time.perf_counter()
        seconds = now - self._start
        values: dict[str, object] = {"tokens_per_s": round(self._tokens / (seconds - self._paused), 1)}
        values["seconds"] = round(seconds, 3)
        if (peak := peak_memory(self._device)) is not None:
            values["peak_memory_gb"] = round(peak / 1e9, 4)
        self._start, self._paused, self._tokens = now, 0.0, 0
        return values

    def paused(self, work: Callable[[], Outcome]) -> Outcome:
        paused_at = time.perf_counter()
        outcome = work()
        self._paused += time.perf_counter() - paused_at
        return outcome


@contextmanager
def _signals(world: World) -> Iterator[list[signal.Signals]]:
    """Collect the first SIGINT or SIGTERM while the block runs; the second raises KeyboardInterrupt.

    Not so in one of several processes: launchers send each signal once more, and SIGKILL when they lose patience.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return

    def note(number: int, frame: FrameType | None) -> None:
        if received and world.size > 1:
            return
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        if not world.is_main:
            return
        # Not print: the signal may have come in the middle of one.
        once_more = "; once more to leave at once" if world.size == 1 else ", if all processes are there"
        os.write(2, f"\n{received[0].name}: saving after this step{once_more}\n".encode())

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
