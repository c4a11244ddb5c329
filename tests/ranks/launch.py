"""Jobs as users start them: torchrun, a verb, a folder."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def torchrun(
    processes: int, arguments: list[str], log: Path, *options: str, inside: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start `nanollm ARGUMENTS` in several processes on this machine, with what it says in a file.

    inside: the words of a command that starts another one somewhere.
    """
    launcher = [*inside, sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *options]
    if not any(option.startswith("--nnodes") for option in options):
        launcher.append("--standalone")
    with log.open("ab") as file:
        return subprocess.Popen(
            [*launcher, "-m", "tests.ranks.traced", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


@contextmanager
def running(
    processes: int, arguments: list[str], log: Path, *options: str, inside: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The same, and nothing of it is left at the end."""
    job = torchrun(processes, arguments, log, *options, inside=inside)
    try:
        yield job
    finally:
        for process in workers(job):
            process.kill()
        if job.poll() is None:
            job.kill()
        job.wait()


def workers(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that are alive, by their number."""
    try:
        children = {child: child.environ().get("RANK") for child in psutil.Process(job.pid).children()}
        ranks = {child: int(rank) for child, rank in children.items() if rank is not None}
        return sorted(ranks, key=lambda child: ranks[child])
    except psutil.Error:  # it, or one of them, ends just now
        return []


def wait_until(condition, seconds: float, every_s: float = 0.002):
    """What the condition gives as soon as it is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(every_s)
    return value
