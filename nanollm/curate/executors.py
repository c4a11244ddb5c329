"""datatrove's executors: processes of this machine, Ray, or Slurm run the steps of a long job.

Each keeps, in the logs of a step, which tasks are completed; those are not run again.
"""

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollm.curate.config import Config
from nanollm.progress import say


@dataclass(frozen=True)
class PipelineStage:
    """Blocks of datatrove (or functions of data, rank, tasks) that run in so many tasks."""

    name: str
    tasks: int
    blocks: Sequence[Any]


def run_here(stages: Sequence[PipelineStage], c: Config, logs: Path) -> None:
    """Run stages one after the other, `workers` tasks at once, and wait for them. ChildProcessError: a task failed."""
    if c.executor == "ray":
        import ray

        # Without "local" Ray would look for the cluster that ran here last, which may be gone, and wait for it.
        ray.init(address=os.environ.get("RAY_ADDRESS") or "local", log_to_driver=False)
    for number, stage in enumerate(stages, start=1):
        folder, failure = logs / stage.name, None
        say(f"step {number} of {len(stages)}, {stage.name}: {stage.tasks} tasks, {c.workers} at once; logs in {folder}")
        executor = _executor(stage, c, folder)
        try:
            executor.run()
        except Exception as error:  # of any task; datatrove has logged it
            failure = error
        if unfinished := executor.get_incomplete_ranks(range(stage.tasks)):  # Ray raises nothing
            why = f" ({' '.join(str(failure).split())})" if failure else ""
            raise ChildProcessError(
                f"task {unfinished[0]} of the step {stage.name} failed{why}, see {folder / 'logs'}; "
                f"the same command goes on with what is not done"
            ) from failure
        if failure:
            raise failure


def _executor(stage: PipelineStage, c: Config, logs: Path) -> Any:
    common = {"tasks": stage.tasks, "workers": c.workers, "logging_dir": str(logs)}
    if c.executor == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor([_die_when_told, *stage.blocks], mem_per_cpu_gb=c.mem_gb, **common)
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor(list(stage.blocks), start_method="spawn", **common)  # which every system has


def _die_when_told(data: object, rank: int, tasks: int) -> None:
    """First block under Ray: datatrove forks a worker of Ray's for a task, and ends the fork by SIGTERM.

    The fork has inherited Ray's handler, with which it sometimes lives on, and the worker waits for it without end.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def submit(stages: Sequence[PipelineStage], c: Config, logs: Path) -> str:
    """Queue stages in Slurm, each after the one before; returns the number of the last job."""
    if shutil.which("sbatch") is None:
        raise ValueError("--executor slurm needs sbatch; start it where jobs are submitted, or use --executor local")
    from datatrove.executor import SlurmPipelineExecutor

    executor = None
    for stage in stages:
        executor = SlurmPipelineExecutor(
            list(stage.blocks),
            tasks=stage.tasks,
            workers=c.workers,
            time=c.slurm.time,
            partition=str(c.slurm.partition),
            mem_per_cpu_gb=c.mem_gb,
            qos="",  # what the cluster or $SBATCH_QOS says
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
            job_name=f"nanollm-{stage.name}",
            logging_dir=str(logs / stage.name),
            depends=executor,
        )
    assert executor is not None
    executor.run()
    return str(executor.job_id)
