"""`nanollm` in processes that are there in a moment and end at any: forks of one that has imported everything.

Before the C library stands disk.c, which counts what a process does to the files of a folder, and at a chosen moment
kills it or lets the disk fail.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

DISK = Path(__file__).with_name("disk.c")
ROOT = Path(__file__).parents[2]


class Fault(IntEnum):
    """What the disk does at its moment; see disk.c."""

    COUNT = 0
    KILL = 1
    FULL = 2
    BROKEN = 3
    TRACE = 4
    ASK_BY_SIGTERM = 5
    ASK_BY_SIGINT = 6


@dataclass(frozen=True)
class Child:
    """A process that runs one command."""

    pid: int
    nursery: "Nursery"
    log: Path

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; that of a process killed by a signal is the signal's number, negative."""
        return os.waitstatus_to_exitcode(self.nursery.status())

    @property
    def moments(self) -> int:
        """How often it changed the files that were watched, if it came to its end."""
        return int(self.log.with_suffix(".moments").read_text())

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Nursery:
    """Starts commands, one at a time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._running: Child | None = None

    def start(
        self,
        words: Sequence[object],
        log: Path,
        *,
        watched: Path | None = None,
        fault: Fault = Fault.COUNT,
        at: int = 0,
    ) -> Child:
        """`nanollm WORDS`, with all it says in a file."""
        if self._running is not None:  # a test that failed left it behind
            self._running.kill()
            self._running.wait()
        order = {"words": list(map(str, words)), "log": str(log), "watched": str(watched or ""), "fault": fault}
        self._running = Child(self._ask(order | {"at": at}), self, log)
        return self._running

    def status(self) -> int:
        """That of the command, when it has ended."""
        self._running = None
        return self._ask("wait")

    def _ask(self, order: object) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    """One that is ready; `folder` takes the compiled library."""
    library = folder / "disk.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(DISK), "-ldl"], check=True)
    # One thread: a fork of a process whose threads compute could wait for them for ever.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["LD_PRELOAD"] = f"{library} {os.environ.get('LD_PRELOAD', '')}"  # another may be there, as faketime's
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.processes"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Nursery(process)
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.wait()
        process.stdout.close()


def serve() -> None:
    """Fork for each order on stdin and tell the pid; wait for its end, and tell the status, when asked to."""
    import docstring_parser  # noqa: F401 (so that a fork has them)
    import torch.profiler  # noqa: F401

    import nanollm.config
    import nanollm.stages.distill
    import nanollm.stages.grpo
    import nanollm.stages.prefer
    import nanollm.stages.preprocess
    import nanollm.stages.pretrain
    import nanollm.stages.sft  # noqa: F401

    disk, pid = ctypes.CDLL(None), 0
    for line in sys.stdin:
        order = json.loads(line)
        if order == "wait":  # until then its number is nobody else's
            print(os.waitpid(pid, 0)[1], flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            run(order, disk)
        print(pid, flush=True)


def run(order: dict[str, object], disk: ctypes.CDLL) -> None:
    """One command, and then the end of this process."""
    from nanollm import cli

    log, watched = Path(str(order["log"])), str(order["watched"])
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have it ignored
    fault, at = Fault(order["fault"]), order["at"]
    if fault is Fault.TRACE:
        at = os.open(log.with_suffix(".trace"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    disk.disk_arm(watched.encode(), int(fault), ctypes.c_long(at))
    try:
        code = cli.main(order["words"])
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    moments = disk.disk_moments()
    disk.disk_arm(b"", 0, ctypes.c_long(0))
    log.with_suffix(".moments").write_text(str(moments))
    os._exit(code or 0)


if __name__ == "__main__":
    serve()
