"""Is every process of this job still there, and what happens to the others when one is not?

A process that ends is noticed at once: torchrun sees it, and its connections break. A host that is cut off or stands
still is not: the others would wait for it in a collective operation, silently, for as long as its time limit. So every
process writes a beat into the job's store; the first one listens to all, the others listen to the first one, and who
hears nothing for SILENCE_S says so and ends its process. Collectives themselves then need no time limit, and one rank
may take its time.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

EVERY_S = 1.0
SILENCE_S = 30.0
FAR_S = 86_400.0  # for waits that the watch ends, if anything does


class Heartbeat:
    """Beats for one rank from `start` to `stop`. The store is used by this object alone: its waits block others."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        silence_s: float = SILENCE_S,
        leave: Callable[[str], None] | None = None,
    ) -> None:
        self.store, self.rank, self.size, self.silence_s = store, rank, size, silence_s
        self.leave = leave or _leave
        self.beats = 0
        self._heard = dict.fromkeys(range(1, size) if rank == 0 else [0], (b"", time.monotonic()))
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin; all ranks must have begun before one of them can be missed."""
        self.store.set_timeout(timedelta(seconds=FAR_S))
        self.beat()
        for work in (self._beat_on, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """No more beats, and nobody is missed. The ranks agree on this first, or the slower ones miss the faster."""
        self._stopped.set()

    def beat(self) -> None:
        """Tell the others that this rank is there, and where."""
        self.beats += 1
        self.store.set(_key(self.rank), f"{self.beats} {socket.gethostname()}")

    def listen(self) -> None:
        """Note who has beaten since the last time."""
        ranks, now = list(self._heard), time.monotonic()
        for rank, beat in zip(ranks, self.store.multi_get([_key(rank) for rank in ranks]), strict=True):
            if beat != self._heard[rank][0]:
                self._heard[rank] = (beat, now)

    def silent(self) -> list[str]:
        """Who has not been heard of for too long: "rank 3 on host b"."""
        late = time.monotonic() - self.silence_s
        hosts = {rank: beat.decode().partition(" ")[2] for rank, (beat, when) in self._heard.items() if when < late}
        return [f"rank {rank} on host {host}" if host else f"rank {rank}" for rank, host in hosts.items()]

    def _beat_on(self) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self.beat()
                self.listen()
            except RuntimeError as error:  # the store is gone: then nothing is heard, and the watch says whom we miss
                os.write(2, f"rank {self.rank} cannot reach the job's store: {_first_line(error)}\n".encode())
                return

    def _watch(self) -> None:
        while not self._stopped.wait(EVERY_S):
            if missed := self.silent():
                self.leave(farewell(self.rank, self.size, missed, self.silence_s))
                return


def farewell(rank: int, size: int, missed: Iterable[str], silence_s: float) -> str:
    """What a process says when it leaves because of others."""
    names = list(missed)
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"rank {rank} of {size} ends: nothing was heard of {some} for {silence_s:.0f} s (the host is down, cut off or "
        f"stands still); start the job again, it goes on from the last checkpoint"
    )


def _leave(message: str) -> None:
    """End this process from any thread, whatever its others are waiting for."""
    sys.stdout.flush()
    os.write(2, f"{message}\n".encode())
    os._exit(1)


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
