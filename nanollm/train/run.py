"""A run in its folder: settings, lock, resume, signals, log, checkpoints and bundle.

A stage opens a `Run` and walks through `run.steps()`; what happens in a step is written there. The folder holds the
resolved settings (config.yaml), the fingerprints of what is read (inputs.json), when and where the run was started
(starts.jsonl), metrics.jsonl, checkpoints/ and, at the end, bundle/. Of several processes the main one writes all
this; all of them read the checkpoints, so the folder must be one they share.
"""

import dataclasses
import json
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten
from types import FrameType

import torch

from nanollm import __version__
from nanollm.bundle import save_adapter, save_bundle, save_merged
from nanollm.config import check_at_least, check_seed, plain, read_mapping, to_yaml
from nanollm.durable import check_writable, lock_folder, read_json, write_file, write_json
from nanollm.model.config import ModelConfig
from nanollm.model.lora import LoraConfig
from nanollm.origin import commit, hardware
from nanollm.progress import Progress, say
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.checkpoint import Checkpoints, checkpoints, load_newest
from nanollm.train.compile import SpeedConfig, compile_blocks
from nanollm.train.memory import peak_memory
from nanollm.train.metrics import RunLog, TrackerName, read_metrics, start_tracker
from nanollm.train.state import TrainState
from nanollm.train.step import StepStats
from nanollm.world import DeviceName, DtypeName, ParallelName, World

STARTS = "starts.jsonl"
MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, and how often to look, log and save."""

    steps: int
    """Steps in all."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    validate_every: int = 100
    """Steps between two validations (0: only at the start and the end)."""
    save_every: int = 200
    """Steps between two checkpoints (0: only at the end and when interrupted)."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""

    def __post_init__(self) -> None:
        own = [option.name for option in dataclasses.fields(self) if option.type is int]
        least = dict.fromkeys(("validate_every", "sample_every", "save_every"), 0)
        for name in own:
            check_at_least(least.get(name, 1), self, name, prefix="train.")


@dataclass(frozen=True, kw_only=True)
class QatConfig(LoopConfig):
    """How long, how often to look, log and save, and how much of it is quantization-aware."""

    qat_fraction: float = 0.0
    """Quantization-aware training: share of the steps, at the end, whose forward pass sees int4 weights, such as 0.1.
    What is saved then loses nothing with --quantize int4 and in a GGUF of q4_0 (0: none)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.qat_fraction <= 1:
            raise ValueError(f"train.qat_fraction must be between 0 and 1, got {self.qat_fraction}")

    @property
    def int4_from(self) -> int | None:
        """Steps before the quantization-aware ones; None: there are none."""
        return self.steps - max(1, round(self.steps * self.qat_fraction)) if self.qat_fraction else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(QatConfig):
    """How long, in which batches, and how often to look, log and save."""

    batch_size: int = 32
    """Sequences per optimizer step."""
    micro_batch_size: int = 8
    """Sequences per forward pass; must divide batch_size. Smaller takes less memory and gives the same step."""
    sample_every: int = 0
    """Steps between two samples (0: only at the start and the end)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.batch_size must be a multiple of train.micro_batch_size ({self.micro_batch_size}), "
                f"got {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run is told, whatever it learns from."""

    out: Path
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, bundle/."""
    seed: int = 0
    """Random seed of the data order, new weights and sampled replies."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """What makes training fast, or small."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """Compute type; auto: bfloat16 where the hardware multiplies it fast. Master weights are always float32."""
    parallel: ParallelName = "ddp"
    """How the processes of torchrun hold the model. ddp: a copy each; fsdp: sharded over all; hsdp: sharded within each
    host, replicated across hosts."""
    trackers: list[TrackerName] = field(default_factory=list)
    """Trackers that receive the metrics, in addition to metrics.jsonl."""

    def __post_init__(self) -> None:
        check_seed(self.seed)


class Run:
    """An open run. `Run.open` is the only way in."""

    def __init__(
        self,
        c: RunConfig,
        train: LoopConfig,
        world: World,
        inputs: Mapping[str, object],
        state: TrainState,
        metrics: RunLog,
    ) -> None:
        self.state = state
        self.is_compiled = False
        self._c, self._train, self._world, self._inputs, self._metrics = c, train, world, inputs, metrics
        self._checkpoints = Checkpoints(c.out / "checkpoints", train.keep_last, world)
        self._line: dict[str, object] = {}  # of metrics.jsonl, for the newest finished step
        self._skipped = ""  # what the newest step saw, if its update was skipped
        self._skipped_in_a_row = 0
        self._seconds, self._tokens = 0.0, 0  # of training alone, since they were last written down
        self._began = self._ended = self._read = time.perf_counter()  # the newest step, the newest rates
        self._is_stepping, self._is_first = False, True
        self._received: list[signal.Signals] = []
        self._bar = Progress("train", train.steps, "steps", done=state.step)
        self._while_training = ExitStack()

    @classmethod
    @contextmanager
    def open(
        cls,
        c: RunConfig,
        train: LoopConfig,
        world: World,
        *,
        inputs: Mapping[str, object],
        fixed: Collection[str],
        make_state: Callable[[], TrainState],
    ) -> Iterator["Run"]:
        """Claim the folder, make the state, and resume from its newest checkpoint if it has one.

        inputs: fingerprints of what is read. fixed: the settings that decide which numbers come out at which step, as
        dotted keys; a folder that was begun with others is refused (see `claim_folder`).
        SIGINT and SIGTERM save after the current step and leave with exit code 130 or 143; a second one leaves at once.
        Of several processes all do the same at the same step, whichever of them got the signal.
        """
        settings = dataclasses.asdict(c) | world.names  # what is really used instead of auto
        if settings["optim"]["lr"] is None:
            raise ValueError("optim.lr: expected a learning rate, got null; only pretrain chooses one")
        check_writable(c.out, "--out")
        with lock_folder(c.out) if world.is_main else nullcontext():
            for newest in checkpoints(c.out / "checkpoints")[:1]:
                if (done := int(newest.name.removeprefix("step-"))) > train.steps:
                    raise ValueError(
                        f"{c.out} has done {done:,} steps, more than --train.steps {train.steps:,}; give at least "
                        f"{done}, or choose another --out"
                    )
            check_same_everywhere(settings, inputs, world)
            if world.is_main:
                claim_folder(c.out, settings, inputs, fixed)
            state = make_state()
            if load_newest(c.out / "checkpoints", state, world):
                say(f"going on from step {state.step:,} in {c.out}")
            metrics = RunLog(None)
            if world.is_main:
                note_start(c.out, state.step, world)
                trackers = [start_tracker(name, c.out, settings, resume_from=state.step) for name in c.trackers]
                metrics = RunLog(c.out, trackers, resume_from=state.step)
            run = cls(c, train, world, inputs, state, metrics)
            run.is_compiled = compile_blocks(state.model, c.speed, world.device)
            run._checkpoints.delete_older()
            with run._while_training:
                run._received = run._while_training.enter_context(_signals(world))
                run._while_training.enter_context(run._bar)
                try:
                    yield run
                except ValueError:  # a step that cannot be taken must not cost those before it
                    if run._is_stepping and state.step and world.size == 1:  # other ranks may well be able to take it
                        run._save()
                    raise

    @property
    def is_new(self) -> bool:
        """Whether no step has been taken yet: the time to look at what training starts from."""
        return self.state.step == 0

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, from 0. The caller takes each step and records it.

        Between two steps the finished one's line is written, a checkpoint is saved when it is due, and the run leaves
        if a signal came.
        """
        while True:
            self._write_line()
            if self.state.step and self.due(self._train.save_every):
                self._save()
            if self.state.step >= self._train.steps:
                break
            self._leave_if_interrupted()
            step, self._began, self._is_stepping = self.state.step, time.perf_counter(), True
            self._bar.leave_out(self._began - self._ended)
            yield step
            assert self.state.step == step + 1, "every step must be recorded, once"
        self._checkpoints.wait()
        self._while_training.close()

    def record(
        self,
        stats: StepStats | None,
        batch: Mapping[str, object],
        *,
        metrics: Mapping[str, object] | None = None,
        tokens: int | None = None,
        note: str | None = None,
    ) -> None:
        """Count the step as taken and log its numbers, every `train.log_every` steps.

        stats: of the step's (last) update; None: there was nothing to learn from. batch: how what the step saw is
        called; said and logged if the update was skipped. metrics: further numbers. tokens: what the rate counts, if
        not the trained ones. note: behind the progress bar, if not the loss.
        """
        self._is_stepping, self._ended = False, time.perf_counter()
        self._seconds += self._ended - self._began
        self._tokens += tokens if tokens is not None else stats.tokens if stats else 0
        self.state.advance()
        self._bar.advance(restarts=self._is_first)  # the first step compiled, and filled every cache
        self._is_first = False
        self._bar.note(note if note is not None else f"loss {stats.loss:.3f}" if stats else "")
        values = {**(metrics or {}), **(stats.values() if stats else {})}
        self._skipped = ""
        if stats is not None and stats.skipped:
            self._line |= values | {"batch": batch}
            self._skipped = shorten(", ".join(f"{name} {value}" for name, value in batch.items()), 300)
            say(
                f"step {self.state.step}: loss {stats.loss}, gradient norm {stats.grad_norm}: the update was skipped; "
                f"the step saw {self._skipped}"
            )
        if self.due(self._train.log_every):
            self._line |= values | self._rates()

    def due(self, every: int) -> bool:
        """Whether the step just recorded ends an interval of so many steps (0: there is none), or the run."""
        return self.state.step == self._train.steps or (every > 0 and self.state.step % every == 0)

    def log(self, values: Mapping[str, object]) -> None:
        """Add values to the line of the newest finished step."""
        self._line |= values

    def save_bundle(
        self,
        verb: str,
        config: ModelConfig,
        tokenizer: Tokenizer,
        adapter_of: tuple[LoraConfig, Path] | None = None,
        **seen: object,
    ) -> Path:
        """Write what the run made as its bundle and return the folder. All ranks must call it.

        adapter_of: the bundle that an adapter was trained on, if one was: it is written to adapter/, and merged into
        the weights of that bundle as they are on the disk. seen: what else provenance.json says, such as `tokens_seen`;
        it says what was measured last, in any case.
        """
        provenance = {
            "made_by": f"nanollm {__version__} {verb}, torch {torch.__version__}",
            "config": read_mapping(self._c.out / "config.yaml"),
            "inputs": self._inputs,
            **seen,
        }
        if self._world.is_main:
            provenance["metrics"] = {
                name: value
                for line in read_metrics(self._c.out)
                for name, value in line.items()
                if name.startswith("val_")
            }
        folder, adapter = self._c.out / "bundle", self._c.out / "adapter"
        if adapter_of is None or not self.state.has_adapter:
            weights = self.state.bundle_weights(keep=self._world.is_main)
            if self._world.is_main:
                save_bundle(folder, config, weights, tokenizer, provenance)
            return folder
        (lora, base), weights = adapter_of, self.state.adapter_weights()
        if self._world.is_main:
            save_adapter(adapter, lora, weights, provenance)
            save_merged(folder, base, adapter)
        return folder

    def _rates(self) -> dict[str, object]:
        """Tokens per second of training alone, without validation, samples and saving; `seconds` has them in it."""
        now = time.perf_counter()
        values: dict[str, object] = {"tokens_per_s": round(self._tokens / self._seconds, 1)}
        values["seconds"] = round(now - self._read, 3)
        if (peak := peak_memory(self._world.device)) is not None:
            values["peak_memory_gb"] = round(peak / 1e9, 4)
        self._read, self._seconds, self._tokens = now, 0.0, 0
        return values

    def _write_line(self) -> None:
        if self._line or self.is_new:
            self._metrics.write(self.state.step, **self._line)
        self._line = {}
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if self._skipped else 0
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"the updates of steps {self.state.step - MAX_SKIPPED_IN_A_ROW + 1} to {self.state.step} were all "
                f"skipped, for numbers that were not finite or far above those before, and the run stopped; "
                f"metrics.jsonl names what each saw, the last {self._skipped}. The checkpoints are finite but may hold "
                f"weights that had already run away: begin anew in another --out with a lower optim.lr, or look at "
                f"that text; if such losses are right, go on with --optim.spike_sigmas 0"
            )

    def _save(self) -> None:
        self._metrics.sync()
        self._checkpoints.save(self.state)

    def _leave_if_interrupted(self) -> None:
        number = int(self._world.all_reduce_max(self._received[0] if self._received else 0))
        if not number:
            return
        self._save()
        self._checkpoints.wait()
        name = signal.Signals(number).name
        say(f"saved step {self.state.step} after {name}; the same command goes on from here")
        raise SystemExit(128 + number)


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

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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


def check_same_everywhere(settings: Mapping[str, object], inputs: Mapping[str, object], world: World) -> None:
    """Raises ValueError where processes, perhaps on different hosts, were started to do different things."""
    first, *others = world.all_gather(flat({**settings, "inputs": inputs}))
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
    return {prefix.removesuffix("."): str(plain(mapping))}
