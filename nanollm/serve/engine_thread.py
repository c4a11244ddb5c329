"""The engine's thread: requests go in, every sampled token comes out to the event loop that asked.

The thread takes submissions and cancellations between two engine steps. A fault in a step ends the replies that were
running; the engine is built anew and the thread lives on.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields

from nanollm.generate.engine import Engine
from nanollm.generate.request import Completion, Finish, Request, StepOutput, TokenLogprobs
from nanollm.serve.protocol import ApiError

log = logging.getLogger(__name__)

STOPPED = "the engine has stopped; start the server again"
RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One more token of one of the replies to a submission."""

    index: int
    token: int
    logprobs: TokenLogprobs | None
    finish: Finish | None
    at: float  # when it was sampled, by time.perf_counter
    is_given: bool = False  # by a tool
    prompt_logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True)
class EngineStats:
    """The engine's counters after its latest step."""

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    drawn_tokens: int = 0
    cache_bytes: int = 0


class Submission:
    """Requests that were submitted together, and their tokens on the way to the event loop that submitted them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.loop = asyncio.get_running_loop()
        self.completions: list[Completion] = []  # the engine's thread alone looks at these
        self.unfinished = len(requests)  # the same
        self._events: list[TokenEvent] = []
        self._fault: ApiError | None = None
        self._arrived = asyncio.Event()

    async def events(self) -> list[TokenEvent]:
        """Wait until there are some, and take all: a slow reader gets several at once. ApiError when none will come."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._fault is not None:
            raise self._fault
        events, self._events = self._events, []
        return events

    def receive(self, events: list[TokenEvent], fault: ApiError | None) -> None:
        """On the event loop: take tokens, or the reason why no more will come."""
        self._events += events
        self._fault = self._fault or fault
        self._arrived.set()


class EngineThread:
    """Owns the engine. `submit` and `cancel` are called from an event loop and return at once."""

    def __init__(self, make_engine: Callable[[], Engine], capacity: int) -> None:
        """capacity: how many replies, running and waiting together, are taken on at once."""
        self.capacity = capacity
        self.stats = EngineStats()
        self.load = 0  # replies taken on and not finished
        self._make_engine = make_engine
        self._submitted: list[Submission] = []  # since the latest step
        self._cancelled: list[Submission] = []  # the same
        self._changed = threading.Condition()
        self._is_stopping = False
        self._open: set[Submission] = set()  # the engine's thread alone
        self._owners: dict[Completion, tuple[Submission, int]] = {}  # with the index of the reply; the same
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started: Future[None] = Future()

    def start(self) -> None:
        """Build the engine and begin, unless that was done already; raises what building it raised."""
        if not self._thread.ident:
            self._thread.start()
        self._started.result()

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

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Take on all of the requests, or none: ApiError 429 where there is no room, 503 where the thread has ended."""
        with self._changed:
            if not self.is_alive:
                raise ApiError(503, STOPPED)
            if self.load + len(requests) > self.capacity:
                message = (
                    f"{self.load} replies are running or waiting and {len(requests)} more were asked for, the server "
                    f"takes {self.capacity}; try again in a moment"
                )
                raise ApiError(429, message, headers={"Retry-After": str(RETRY_AFTER_S)})
            submission = Submission(requests)
            self.load += len(requests)
            self._submitted.append(submission)
            self._changed.notify()
        return submission

    def cancel(self, submission: Submission) -> None:
        """Give up what is not finished of it; before the next step its rows are free."""
        with self._changed:
            self._cancelled.append(submission)
            self._changed.notify()

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except Exception as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while not self._serve(engine):
                del engine  # its cache goes before the next one's comes
                engine = self._make_engine()
        except Exception:
            log.exception("the engine's thread has ended")
        finally:
            with self._changed:
                self._is_stopping = True
                self._open.update(self._submitted)
            self._give_up(ApiError(503, STOPPED))

    def _serve(self, engine: Engine) -> bool:
        """Step until the end (true), or until the engine fails (false)."""
        while True:
            # A new object each time, because the event loop reads it without a lock.
            self.stats = EngineStats(**{each.name: getattr(engine, each.name) for each in fields(EngineStats)})
            # Held only to take what came: submit and cancel run on the event loop and must not wait for a step.
            with self._changed:
                self._changed.wait_for(
                    lambda: self._submitted or self._cancelled or self._is_stopping or engine.has_work
                )
                if self._is_stopping:
                    return True
                submitted, self._submitted = self._submitted, []
                cancelled, self._cancelled = self._cancelled, []
            # All are open before the first is begun: whatever fails now, each hears of it.
            self._open.update(submitted)
            try:
                for submission in submitted:
                    self._begin(engine, submission)
                for submission in cancelled:
                    self._abort(engine, submission)
                if engine.has_work:
                    self._hand_out(engine, engine.step())
            except Exception:
                log.exception("the engine failed; what was running is given up and the engine is built anew")
                self._give_up(ApiError(500, "the engine failed while it was replying; try again"))
                return False

    def _begin(self, engine: Engine, submission: Submission) -> None:
        try:
            for index, request in enumerate(submission.requests):
                completion = engine.submit(request)
                self._owners[completion] = (submission, index)
                submission.completions.append(completion)
        except ValueError as error:  # the engine refuses this request, and is well
            self._abort(engine, submission)
            _deliver(submission, [], ApiError(400, str(error)))

    def _abort(self, engine: Engine, submission: Submission) -> None:
        if submission not in self._open:
            return  # all of it was finished
        self._open.remove(submission)
        for completion in submission.completions:
            engine.cancel(completion)
            self._owners.pop(completion, None)
        self._unload(submission.unfinished)

    def _hand_out(self, engine: Engine, drawn: list[StepOutput]) -> None:
        now, finished = time.perf_counter(), 0
        events = defaultdict[Submission, list[TokenEvent]](list)
        failures = dict[Submission, str]()
        for one in drawn:
            finish = one.completion.finish
            submission, index = self._owners[one.completion]
            own = events[submission]
            of_prompt, end = one.completion.prompt_logprobs, None if one.given else finish
            own.append(TokenEvent(index, one.token, one.logprobs, end, now, prompt_logprobs=of_prompt))
            for place, token in enumerate(one.given, start=1):
                end = finish if place == len(one.given) else None
                own.append(TokenEvent(index, token, None, end, now, is_given=True))
            if finish is not None:
                finished += 1
                submission.unfinished -= 1
                del self._owners[one.completion]
                if not submission.unfinished:
                    self._open.remove(submission)
            if one.completion.failure is not None:
                failures[submission] = one.completion.failure
        self._unload(finished)
        for submission, own in events.items():
            if submission in failures:
                self._abort(engine, submission)
                _deliver(submission, [], ApiError(400, failures[submission]))
            else:
                _deliver(submission, own)

    def _give_up(self, reason: ApiError) -> None:
        """Tell all open submissions why they end."""
        given_up, self._open = self._open, set()
        self._owners.clear()
        self._unload(sum(submission.unfinished for submission in given_up))
        for submission in given_up:
            _deliver(submission, [], reason)

    def _unload(self, count: int) -> None:
        with self._changed:
            self.load -= count


def _deliver(submission: Submission, events: list[TokenEvent], fault: ApiError | None = None) -> None:
    try:
        submission.loop.call_soon_threadsafe(submission.receive, events, fault)
    except RuntimeError:
        log.debug("an event loop was closed before its replies were complete")
