"""The engine's thread hands out every token once, to whoever asked, and outlives what goes wrong."""

import asyncio
import time
from contextlib import contextmanager

import pytest

from nanollm.generate.engine import Engine, generate
from nanollm.generate.request import Request
from nanollm.generate.sampling import SamplingConfig
from tests.serve.running import wait_until

pytest.importorskip("fastapi", reason='fastapi is not installed: pip install -e ".[serve]"')
from nanollm.serve.engine_thread import EngineThread
from nanollm.serve.protocol import ApiError

GREEDY = SamplingConfig(temperature=0)


@contextmanager
def working(bundle, capacity=8, rows=4, make_engine=None):
    thread = EngineThread(make_engine or (lambda: Engine(bundle.model, rows=rows)), capacity)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def asked(number, max_tokens=8):
    return Request(prompt=[2, 300 + number, 40], max_tokens=max_tokens, sampling=GREEDY)


async def drawn(submission):
    """The ids of all replies to a call, by their index."""
    ids = {index: [] for index in range(len(submission.requests))}
    unfinished = len(ids)
    while unfinished:
        for one in await submission.events():
            ids[one.index].append(one.token)
            unfinished -= one.finish is not None
    return list(ids.values())


def test_each_call_gets_its_own_tokens_as_if_it_were_alone(bundle):
    async def ask_all(thread):
        calls = [thread.submit([asked(number), asked(number + 1)]) for number in range(4)]
        return await asyncio.gather(*map(drawn, calls))

    expected = {
        number: generate(bundle.model, [asked(number).prompt], GREEDY, max_tokens=8, stop_token_ids=frozenset())[0].ids
        for number in range(5)
    }
    with working(bundle) as thread:
        answers = asyncio.run(ask_all(thread))
        wait_until(lambda: thread.load == 0)
    assert answers == [[expected[number], expected[number + 1]] for number in range(4)]


def test_a_call_is_taken_on_whole_or_not_at_all(bundle):
    async def overfill(thread):
        first = thread.submit([asked(0, 150)] * 5)
        with pytest.raises(ApiError, match="429: 5 replies are running or waiting and 4 more were asked for"):
            thread.submit([asked(1)] * 4)
        assert thread.load == 5
        second = thread.submit([asked(1)] * 3)
        thread.cancel(first)
        await drawn(second)
        await asyncio.to_thread(wait_until, lambda: thread.load == 0)
        thread.cancel(first)  # once more does no harm
        await drawn(thread.submit([asked(2)] * 8))

    with working(bundle) as thread:
        asyncio.run(overfill(thread))
        wait_until(lambda: thread.load == 0)


def test_what_the_engine_refuses_ends_that_call_alone(bundle):
    async def ask(thread):
        good = thread.submit([asked(0)])
        bad = thread.submit([asked(1), Request(prompt=[], max_tokens=1)])
        with pytest.raises(ApiError, match=r"400: .*an empty one"):
            await bad.events()
        return await drawn(good)

    with working(bundle) as thread:
        assert len(asyncio.run(ask(thread))[0]) == 8
        wait_until(lambda: thread.load == 0)


def test_a_fault_ends_every_call_that_was_open_and_the_next_is_answered(bundle, caplog):
    made = []

    def make():
        made.append(Engine(bundle.model, rows=4))
        if len(made) == 1:
            made[0].step = lambda: 1 / 0
        return made[-1]

    async def ask(thread):
        calls = [thread.submit([asked(number)]) for number in range(3)]
        outcomes = await asyncio.gather(*map(drawn, calls), return_exceptions=True)
        return outcomes, await drawn(thread.submit([asked(3)]))

    with working(bundle, make_engine=make) as thread:
        outcomes, after = asyncio.run(ask(thread))
        wait_until(lambda: thread.load == 0)
        assert thread.is_alive
    assert isinstance(outcomes[0], ApiError)
    assert all(isinstance(outcome, ApiError) or len(outcome[0]) == 8 for outcome in outcomes)
    assert len(after[0]) == 8
    assert "ZeroDivisionError" in caplog.text


def test_an_engine_that_cannot_be_built_is_told_at_the_start():
    def make():
        raise ValueError("the engine needs at least one row, got 0")

    with pytest.raises(ValueError, match="at least one row"):
        EngineThread(make, 1).start()


class SlowEngine(Engine):
    """Not done before somebody else had his turn, however busy the machine is."""

    def step(self):
        time.sleep(0.05)
        return super().step()


def test_stopping_ends_what_is_open(bundle):
    async def ask(thread):
        submission = thread.submit([asked(0, 180)])
        await submission.events()
        await asyncio.to_thread(thread.stop)
        with pytest.raises(ApiError, match="503: the engine has stopped"):
            async with asyncio.timeout(30):
                while True:
                    await submission.events()
        with pytest.raises(ApiError, match="503: the engine has stopped"):
            thread.submit([asked(1)])

    with working(bundle, make_engine=lambda: SlowEngine(bundle.model, rows=1)) as thread:
        asyncio.run(ask(thread))
