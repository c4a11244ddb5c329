"""How does one HTTP request become replies, in time and only as long as somebody listens?"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from starlette.types import Receive

from nanollm.serve.choice import Choice, Part
from nanollm.serve.errors import ApiError
from nanollm.serve.metrics import Metrics
from nanollm.serve.worker import EngineFault, EngineStopped, News, Replies, Worker

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody listens any more."""


class Job:
    """All replies to one HTTP request."""

    def __init__(
        self, worker: Worker, metrics: Metrics, replies: Replies, choices: Sequence[Choice], deadline_s: float
    ) -> None:
        self.choices = choices
        self.deadline_s = deadline_s
        self.began = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + deadline_s
        self.open = len(choices)
        self._worker, self._metrics, self._replies = worker, metrics, replies
        self._first_at: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; the samples of a prompt share it, as one object."""
        return sum(len(prompt) for prompt in {id(r.prompt): r.prompt for r in self._replies.requests}.values())

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    async def next(self) -> list[Part]:
        """What is new, one part for each choice that has news. ApiError when no more is to come."""
        try:
            async with asyncio.timeout_at(self.deadline):
                news = await self._replies.news()
        except TimeoutError:
            raise ApiError(504, f"the reply was not complete after {self.deadline_s:g} seconds; ask for less") from None
        except EngineStopped as error:
            raise ApiError(503, str(error)) from error
        except EngineFault as error:
            raise ApiError(500, str(error)) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        parts = [choice.take([one for one in news if one.index == choice.index]) for choice in self._named(news)]
        self.open -= sum(part.finish is not None for part in parts)
        self._measure(news[0].at, news[-1].at)
        return parts

    async def rest(self) -> list[Part]:
        """Everything until the end, one part for each choice."""
        whole = [Part(choice.index) for choice in self.choices]
        while self.open:
            for part in await self.next():
                whole[part.index].text += part.text
                whole[part.index].entries += part.entries
                whole[part.index].finish = part.finish
        return whole

    def close(self) -> None:
        """Give up what is not complete."""
        if self.open:
            self._worker.cancel(self._replies)
            self.open = 0

    def _named(self, news: Sequence[News]) -> list[Choice]:
        return [self.choices[index] for index in sorted({one.index for one in news})]

    def _measure(self, first_at: float, last_at: float) -> None:
        if self._first_at is None:
            self._first_at = first_at
            self._metrics.first_token_s.observe(first_at - self.began)
        if not self.open and (later := self.completion_tokens - len(self.choices)) > 0:
            self._metrics.token_s.observe((last_at - self._first_at) * len(self.choices) / later)


async def while_listening(work: Awaitable[T], receive: Receive) -> T:
    """The outcome of the work; ClientGone, and the work is cancelled, if the client hangs up before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
