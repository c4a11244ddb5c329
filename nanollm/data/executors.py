"""Who runs the steps of a long job: processes of this machine, Ray, or Slurm?

datatrove's executors do. Each keeps, in the logs of a step, which tasks are completed; those are not run again.
"""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nanollm.progress import say


@dataclass(frozen=True)
class Step:
    """Blocks of datatrove (or functions of data, rank, tasks) that run in so many tasks."""

    name: str
    tasks: int
    blocks: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """For --executor slurm."""

    partition: str | None = None
    """Where to queue; required."""
    time: str = "24:00:00"
    """Limit of a task."""
    mem_gb: int = 4
    """Memory of a task."""
    qos: str = "normal"
    """Quality of service; empty: none."""
    setup: str | None = None
    """Shell command before each task; null: puts the Python of this command first in PATH."""

    def __post_init__(self) -> None:
        if not self.time:
            raise ValueError("slurm.time must be a limit such as 24:00:00, got an empty text")
        if self.mem_gb < 1:
            raise ValueError(f"slurm.mem_gb must be at least 1, got {self.mem_gb}")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """For --executor ray."""

    address: str | None = None
    """Of the cluster, HOST:PORT, or auto for one that runs on this machine; null: $RAY_ADDRESS, else a new one here."""
    mem_gb: float = 2
    """Memory of a task."""

    def __post_init__(self) -> None:
        if not 0 < self.mem_gb < float("inf"):
            raise ValueError(f"ray.mem_gb must be above 0, got {self.mem_gb}")


def run_here(steps: Sequence[Step], workers: int, logs: Path, by: Literal["local", "ray"], ray: RayConfig) -> None:
    """Run steps one after the other, `workers` tasks at once, and wait for them. ChildProcessError: a task failed."""
    if by == "local":
        from datatrove.executor import LocalPipelineExecutor

        # Fresh processes, which every system has.
        _run_all(steps, workers, logs, partial(LocalPipelineExecutor, start_method="spawn"))
    else:
        from datatrove.executor import RayPipelineExecutor

        steps = [Step(step.name, step.tasks, [_die_when_told, *step.blocks]) for step in steps]
        with _connected(ray):
            _run_all(steps, workers, logs, partial(RayPipelineExecutor, mem_per_cpu_gb=ray.mem_gb))


def _die_when_told(data: object, rank: int, tasks: int) -> None:
    """First block under Ray: datatrove forks a worker of Ray's for a task, and ends the fork by SIGTERM.

    The fork has inherited Ray's handler, with which it sometimes lives on, and the worker waits for it without end.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run_all(steps: Sequence[Step], workers: int, logs: Path, executor_of: Callable[..., Any]) -> None:
    for number, step in enumerate(steps, start=1):
        folder = logs / step.name
        say(f"step {number} of {len(steps)}, {step.name}: {step.tasks} tasks, {workers} at once; logs in {folder}")
        _run(step, executor_of(list(step.blocks), tasks=step.tasks, workers=workers, logging_dir=str(folder)), folder)


def _run(step: Step, executor: Any, folder: Path) -> None:
    failure: Exception | None = None
    try:
        executor.run()
    except Exception as error:  # of any task; datatrove has logged it
        failure = error
    if unfinished := executor.get_incomplete_ranks(range(step.tasks)):  # Ray raises nothing
        why = f" ({' '.join(str(failure).split())})" if failure else ""
        raise ChildProcessError(
            f"task {unfinished[0]} of the step {step.name} failed{why}, see {folder / 'logs'}; "
            f"the same command goes on with what is not done"
        ) from failure
    if failure:
        raise failure


@contextmanager
def _connected(c: RayConfig) -> Iterator[None]:
    """Be connected to Ray; a connection that was there before stays."""
    import ray

    if ray.is_initialized():
        yield
        return
    # Without "local" Ray would look for the cluster that ran here last, which may be gone, and wait for it.
    address = c.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False)
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at {address} ({error}); start one, give another address, "
            f"or set RAY_AUTH_MODE=token if it asks for its token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """OSError if nobody listens at HOST:PORT; Ray itself would wait without end."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def submit(steps: Sequence[Step], workers: int, logs: Path, slurm: SlurmConfig) -> str:
    """Queue steps in Slurm, each after the one before; returns the number of the last job."""
    if shutil.which("sbatch") is None:
        raise ValueError("--executor slurm needs sbatch; start it where jobs are submitted, or use --executor local")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ValueError("--executor slurm submits its jobs itself; start it outside of a Slurm array")
    from datatrove.executor import SlurmPipelineExecutor

    executor = None
    for step in steps:
        executor = SlurmPipelineExecutor(
            list(step.blocks),
            tasks=step.tasks,
            workers=workers,
            time=slurm.time,
            partition=str(slurm.partition),
            mem_per_cpu_gb=slurm.mem_gb,
            qos=slurm.qos,
            env_command=slurm.setup or f"export PATH={Path(sys.executable).parent}:$PATH",
            job_name=f"nanollm-{step.name}",
            logging_dir=str(logs / step.name),
            depends=executor,
        )
    assert executor is not None
    executor.run()
    return str(executor.job_id)
