"""Detects hosts that are cut off or hang: a rank that misses another's heartbeat for too long ends with a message.

A process that ends is noticed at once: torchrun sees it, and its connections break. A host that hangs is not: the
others would wait for it in a collective for as long as its timeout. So every rank writes a heartbeat to the job's
store. Rank 0 watches all others, the others watch rank 0, and a rank that sees none for SILENCE_S says so and ends its
process. Collectives themselves then need no timeout, and a rank may be slow.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Self
from uuid import uuid4

from torch.distributed.distributed_c10d import PrefixStore, Store

from nanollm.progress import say

EVERY_S = 1.0
SILENCE_S = 20.0
FAR_S = 86_400.0  # for waits that the watch ends, if anything does
MEETING_S, MEETING_AGAIN_S = 300.0, 60.0  # hosts start one after the other, but start again at once
LOOK_S, SAID_AFTER_S = 0.1, 10.0


def meet(store: Store, rank: int, size: int, *, limit_s: float = MEETING_S) -> Store:
    """A namespace of the store for this attempt alone, once all its ranks are there. ConnectionError if some stay away.

    torchrun keeps one store for all attempts: what the ranks of an earlier one wrote is still in it, and would be taken
    for the word of those of this one. Its number of restarts does not tell the attempts apart, because hosts count for
    themselves. So every rank says hello with a word of its own, and by that word rank 0 lets it into its namespace.
    """
    word, deadline = uuid4().hex, _Deadline(limit_s)
    store.set(f"hello/{rank}", word)

    def look(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank > 0:
        while not (welcome := look(f"welcome/{rank}")).startswith(word):
            deadline.wait("rank 0")
        namespace = welcome.removeprefix(word)
        store.set(f"here/{namespace}/{rank}", "")
        return PrefixStore(namespace, store)
    missing, welcomed = set(range(1, size)), dict[int, str]()
    while missing:
        for other in missing:
            hello = look(f"hello/{other}")
            if hello and hello != welcomed.get(other):  # the first may still be that of an earlier attempt
                store.set(f"welcome/{other}", hello + word)
                welcomed[other] = hello
        missing = {other for other in missing if not store.check([f"here/{word}/{other}"])}
        if missing:
            deadline.wait(", ".join(f"rank {other}" for other in sorted(missing)[:4]))
    return PrefixStore(word, store)


class _Deadline:
    """Waits for others up to a limit, and says so after a while."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.began, self.has_said = limit_s, time.monotonic(), False

    def wait(self, missed: str) -> None:
        waited = time.monotonic() - self.began
        if waited > self.limit_s:
            raise ConnectionError(
                f"{missed} did not join the job within {self.limit_s:.0f} s; look at what it says on its host"
            )
        if waited > SAID_AFTER_S and not self.has_said:
            self.has_said = True
            say(f"waiting for {missed}, {self.limit_s:.0f} s in all; what keeps it is said on its host")
        time.sleep(LOOK_S)


class Heartbeat:
    """Beats for one rank while the context lasts. The store is used by this object alone: its waits block others."""

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

    def __enter__(self) -> Self:
        self.store.set_timeout(timedelta(seconds=FAR_S))
        self.beat()
        for work in (self._beat_on, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """However it ends: a rank that fails must be missed while it is still on its way out."""
        self.stop()

    def stop(self) -> None:
        """No more beats, and nobody is missed. The ranks agree on this first, or the slower ones miss the faster."""
        self._stopped.set()

    def beat(self) -> None:
        """Tell the others that this rank is there, and where."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", f"{self.beats} {socket.gethostname()}")

    def listen(self) -> None:
        """Note who has beaten since the last time."""
        ranks, now = [rank for rank in self._heard if self._has_begun(rank)], time.monotonic()
        if not ranks:
            return
        for rank, beat in zip(ranks, self.store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
            if beat != self._heard[rank][0]:
                self._heard[rank] = (beat, now)

    def _has_begun(self, rank: int) -> bool:
        """A key that was never written would be waited for."""
        return bool(self._heard[rank][0]) or self.store.check([f"beat/{rank}"])

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
                reason = (str(error).splitlines() or ["no message"])[0]
                os.write(2, f"rank {self.rank} cannot reach the job's store: {reason}\n".encode())
                return

    def _watch(self) -> None:
        while not self._stopped.wait(EVERY_S):
            if missed := self.silent():
                self.leave(farewell_message(self.rank, self.size, missed, self.silence_s))
                return


def farewell_message(rank: int, size: int, missed: Iterable[str], silence_s: float) -> str:
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
