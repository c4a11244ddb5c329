"""Threads that stay fast beside other programs: while cores are contended they sleep soon and are woken at once.

libgomp, PyTorch's OpenMP on Linux, lets a thread that waits for the others spin for milliseconds before it sleeps. On a
quiet machine that is fastest. Beside another busy process it wastes the very core that the awaited thread could run on,
and a step takes several times as long. libgomp spins only briefly while more of its threads exist than there are cores,
and looks at their number at every wait; so a parked thread that holds a team of its own shortens the spinning, and its
end makes it long again. A short time slice lets a woken thread take the core from a busy program at once (Linux 6.12 or
newer; older kernels ignore it). No number that is computed changes.

Source: GOMP_SPINCOUNT in the manual of libgomp; config/linux/wait.h and env.c in its source; sched_setattr(2).
"""

import ctypes
import os
import platform
import struct
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

WAITING = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}
"""How threads wait unless the user says otherwise: 300,000 turns, as is libgomp's default, and 1,000 with too many
threads, where the default would be 100 (which costs half the speed where the cores turn out to be free)."""
INTERVAL_S = 0.5
SLICE_NS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number; Python and C libraries have no name for it."""
CONTENDED = 0.25
"""Seconds per second that this process's threads stand in line for a core, from which the cores count as contended."""


def choose_waiting() -> bool:
    """Say how threads shall wait, before torch is imported; whether that was still possible and left to us."""
    if sys.platform != "linux" or "torch" in sys.modules or any(map(os.environ.get, WAITING)):
        return False
    os.environ.update(WAITING)
    return True


@cache
def watch_cores() -> None:
    """Watch from now on, in the background, whether this process's threads must wait for cores.

    Does nothing for a single thread, where the user has chosen how threads wait, or where Linux does not tell.
    """
    import torch

    is_ours = all(os.environ.get(name) == value for name, value in WAITING.items())
    if is_ours and torch.get_num_threads() > 1 and seconds_in_line() is not None:
        ask_for_short_slices()
        threading.Thread(target=_watch, args=[threading.Event()], name="watch_cores", daemon=True).start()


def ask_for_short_slices() -> None:
    """Have this thread, and those it starts, run in short time slices; where that is refused nothing changes."""
    number = SCHED_SETATTR.get(platform.machine())
    if number is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)  # stays as it is
        # struct sched_attr: size, policy (0: normal), flags, nice, priority, runtime, deadline, period, two clamps
        attributes = struct.pack("IIQiIQQQII", 56, 0, 0, nice, 0, SLICE_NS, 0, 0, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


def seconds_in_line() -> float | None:
    """Seconds that the living threads of this process have been ready to run but had no core; None where not known."""
    tasks, total = Path("/proc/self/task"), None
    for thread in tasks.iterdir() if tasks.exists() else ():
        with suppress(OSError, ValueError, IndexError):  # it has just ended
            total = (total or 0.0) + int((thread / "schedstat").read_text("ascii").split()[1]) / 1e9
    return total


def _watch(stop: threading.Event) -> None:
    from nanollm.progress import say

    release: threading.Event | None = None
    has_told = False
    before, began = seconds_in_line(), time.monotonic()
    while not stop.wait(INTERVAL_S):
        after, now = seconds_in_line(), time.monotonic()
        if before is None or after is None:
            before, began = after, now
            continue
        is_contended = (after - before) / (now - began) > CONTENDED
        before, began = after, now
        if is_contended and release is None:
            release = threading.Event()
            threading.Thread(target=_hold_a_team, args=[release], name="hold_a_team", daemon=True).start()
            if not has_told:
                has_told = True
                load = f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"
                say(f"other programs are at work ({load}): this takes longer than on a quiet machine")
        elif not is_contended and release is not None:
            release.set()
            release = None


def _hold_a_team(release: threading.Event) -> None:
    """Make this thread's first parallel region, and keep its team until released."""
    import torch

    torch.ones(1 << 18).add_(1)  # large enough for PyTorch to share it among threads
    release.wait()
