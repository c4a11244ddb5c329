"""Who owns the engine, and how do its tokens get to the event loop?

One thread. It takes orders (submit, cancel) between two steps and hands out what each step drew, with one call into the
event loop. A fault in a step ends the replies that were running; the engine is built anew and the thread lives on.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanollm.generate.engine import Engine
from nanollm.generate.request import Completion, Drawn, Finish, Request, Scored

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """There is no room for so many replies now."""


class EngineStopped(Exception):
    """The engine's thread has ended; only a new server helps."""


class EngineFault(Exception):
    """The engine failed under a request; nobody knows whose fault it was."""


@dataclass(frozen=True, slots=True)
class News:
    """One more token of one of the replies."""

    index: int
    token: int
    scored: Scored | None
    finish: Finish | None
    at: float
    """When it was drawn, by time.perf_counter."""


@dataclass(frozen=True)
class Figures:
    """What the engine's counters said after its newest step."""

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    drawn_tokens: int = 0
    cache_bytes: int = 0

    @classmethod
    def of(cls, engine: Engine) -> "Figures":
        return cls(**{name: getattr(engine, name) for name in cls.__dataclass_fields__})


class Replies:
    """The replies to one call, on their way from the engine's thread to the event loop that asked for them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.loop = asyncio.get_running_loop()
        self.completions: list[Completion] = []  # the engine's thread alone looks at these
        self.unfinished = len(requests)  # the same
        self._news: list[News] = []
        self._fault: Exception | None = None
        self._arrived = asyncio.Event()

    async def news(self) -> list[News]:
        """Wait until there is some, and take all: whoever is slow gets several tokens at once."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._fault is not None:
            raise self._fault
        news, self._news = self._news, []
        return news

    def receive(self, news: list[News], fault: Exception | None) -> None:
        """On the event loop: take what the engine's thread hands over."""
        self._news += news
        self._fault = self._fault or fault
        self._arrived.set()


class Worker:
    """The engine's thread. `submit` and `cancel` are called from an event loop and return at once."""

    def __init__(self, make_engine: Callable[[], Engine], capacity: int) -> None:
        """capacity: the most replies that are taken on at once, running and waiting together."""
        self.capacity = capacity
        self.figures = Figures()
        self._make_engine = make_engine
        self._orders: deque[tuple[str, Replies]] = deque()
        self._changed = threading.Condition()
        self._load = 0
        self._is_stopping = False
        self._open: dict[int, Replies] = {}  # by id; the engine's thread alone
        self._places: dict[int, tuple[Replies, int]] = {}  # id of a completion -> whose it is, and which; the same
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._started = threading.Event()
        self._failed_start: Exception | None = None

    def start(self) -> None:
        """Build the engine and begin, unless that was done already; raises what building it raised."""
        if not self._thread.ident:
            self._thread.start()
        self._started.wait()
        if self._failed_start is not None:
            raise self._failed_start

    def stop(self) -> None:
        """End the thread after its step, and wait for that."""
        self.end()
        self._thread.join()

    def end(self) -> None:
        """End the thread after its step; replies that are not complete are given up."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    @property
    def load(self) -> int:
        """Replies taken on and not finished."""
        return self._load

    def submit(self, requests: Sequence[Request]) -> Replies:
        """Take on all of the requests, or none: QueueFull, or EngineStopped."""
        with self._changed:
            if not self.is_alive:
                raise EngineStopped("the engine has stopped; start the server again")
            if self._load + len(requests) > self.capacity:
                raise QueueFull(
                    f"{self._load} replies are running or waiting and {len(requests)} more were asked for, the server "
                    f"takes {self.capacity}; try again in a moment"
                )
            replies = Replies(requests)
            self._load += len(requests)
            self._orders.append(("submit", replies))
            self._changed.notify()
        return replies

    def cancel(self, replies: Replies) -> None:
        """Give up what is not finished of these replies; before the next step their rows are free."""
        with self._changed:
            self._orders.append(("cancel", replies))
            self._changed.notify()

    # --- the engine's thread ---

    def _live(self) -> None:
        try:
            engine = self._make_engine()
        except Exception as error:
            self._failed_start = error
            return
        finally:
            self._started.set()
        try:
            while not self._serve(engine):
                del engine  # its cache goes before the next one's comes
                engine = self._make_engine()
        except Exception:
            log.exception("the engine's thread has ended")
        finally:
            self._close()

    def _serve(self, engine: Engine) -> bool:
        """Work until the end (true), or until the engine fails (false)."""
        while True:
            self.figures = Figures.of(engine)
            orders = self._wait(engine)
            if orders is None:
                return True
            try:
                self._work(engine, orders)
            except Exception:
                log.exception("the engine failed; what was running is given up and the engine is built anew")
                self._give_up(EngineFault("the engine failed while it was replying; try again"))
                return False

    def _close(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._open |= {id(replies): replies for order, replies in self._orders if order == "submit"}
        self._give_up(EngineStopped("the engine has stopped; start the server again"))

    def _wait(self, engine: Engine) -> list[tuple[str, Replies]] | None:
        """The orders since the last step, waiting for some if there is nothing to do; None: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._is_stopping or engine.has_work)
            if self._is_stopping:
                return None
            orders = list(self._orders)
            self._orders.clear()
            return orders

    def _work(self, engine: Engine, orders: list[tuple[str, Replies]]) -> None:
        # All are open before the first is begun: whatever fails now, each hears of it.
        self._open |= {id(replies): replies for order, replies in orders if order == "submit"}
        for order, replies in orders:
            if order == "submit":
                self._begin(engine, replies)
            else:
                self._end(engine, replies)
        if engine.has_work:
            self._hand_out(engine.step())

    def _begin(self, engine: Engine, replies: Replies) -> None:
        try:
            for request in replies.requests:
                completion = engine.submit(request)
                self._places[id(completion)] = (replies, len(replies.completions))
                replies.completions.append(completion)
        except ValueError as error:  # the engine refuses this request, and is well
            self._end(engine, replies)
            self._tell([(replies, [], error)])

    def _end(self, engine: Engine, replies: Replies) -> None:
        if self._open.pop(id(replies), None) is None:
            return  # all of it had been drawn
        for completion in replies.completions:
            engine.cancel(completion)
            self._places.pop(id(completion), None)
        self._unload(replies.unfinished)

    def _hand_out(self, drawn: list[Drawn]) -> None:
        now = time.perf_counter()
        news: dict[int, tuple[Replies, list[News], Exception | None]] = {}
        finished = 0
        for one in drawn:
            replies, index = self._places[id(one.completion)]
            _, entries, _ = news.setdefault(id(replies), (replies, [], None))
            entries.append(News(index, one.token, one.scored, one.completion.finish, now))
            if one.completion.finish is not None:
                finished += 1
                replies.unfinished -= 1
                del self._places[id(one.completion)]
                if not replies.unfinished:
                    del self._open[id(replies)]
        self._unload(finished)
        self._tell(list(news.values()))

    def _give_up(self, reason: Exception) -> None:
        """Tell all open replies why they end."""
        given_up = list(self._open.values())
        self._open.clear()
        self._places.clear()
        self._unload(sum(replies.unfinished for replies in given_up))
        self._tell([(replies, [], reason) for replies in given_up])

    def _unload(self, count: int) -> None:
        with self._changed:
            self._load -= count

    def _tell(self, messages: list[tuple[Replies, list[News], Exception | None]]) -> None:
        """Hand over to each event loop with one call."""
        for loop in {replies.loop for replies, _, _ in messages}:
            mine = [message for message in messages if message[0].loop is loop]
            try:
                loop.call_soon_threadsafe(_receive_all, mine)
            except RuntimeError:
                log.debug("an event loop was closed before its replies were complete")


def _receive_all(messages: list[tuple[Replies, list[News], Exception | None]]) -> None:
    for replies, news, fault in messages:
        replies.receive(news, fault)
