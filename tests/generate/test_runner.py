"""The runner for GPUs does no more than the requests need: counted here, where there is none."""

import dataclasses
import gc
import time
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanollm.generate import cpu_runner
from nanollm.generate.engine import Engine
from nanollm.generate.request import ModelOutput, Request
from nanollm.generate.runner import CAPTURE_AFTER, STEP_SLOTS, DecodeStep, TorchRunner, group_by_length
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.cache import LatentCache
from nanollm.model.transformer import Transformer, Trunk
from tests.generate.test_engine import CHOICES, GREEDY, answers, request
from tests.model.conftest import TINY

PLAIN = {"top_logprobs": None, "prompt_logprobs": None, "stop_token_ids": frozenset()}


def watched(monkeypatch, owner, name, look):
    """Let `look` see the result and the arguments of each call."""
    method = getattr(owner, name)

    def watching(*given, **named):
        result = method(*given, **named)
        look(result, *given, **named)
        return result

    monkeypatch.setattr(owner, name, watching)


def test_mixed_prompts_are_padded_to_less_than_twice_their_tokens(tiny_model, monkeypatch):
    read = []
    watched(monkeypatch, Trunk, "routed", lambda _, trunk, tokens, *__, **___: read.append(tokens.numel()))
    engine, rng = Engine(tiny_model, rows=32, kernels="torch", chunk=1024), np.random.default_rng(0)
    lengths = [60, *range(1, 32)]
    asked = [Request(prompt=rng.integers(0, 97, n).tolist(), max_tokens=1, sampling=GREEDY) for n in lengths]
    got = answers(engine, [engine.submit(each) for each in asked])
    assert sum(lengths) <= sum(read) < 2 * sum(lengths)
    plain = Engine(tiny_model, rows=32)
    assert [each[1] for each in got] == [each[1] for each in answers(plain, [plain.submit(each) for each in asked])]
    for spread in (1.1, 3, 50):
        lengths = (5 * spread ** rng.random(64)).astype(int).tolist()
        groups = group_by_length(lengths)
        assert sorted(index for group in groups for index in group) == [*range(64)]
        assert sum(len(group) * max(lengths[index] for index in group) for group in groups) <= 1.5 * sum(lengths)
    assert group_by_length([8, 1500, 8, 8]) == [[1], [0, 2, 3]]


@pytest.mark.parametrize(("rows", "length"), [(1, 40), (1, 64), (96, 33)])
def test_the_cache_is_what_the_requests_need(tiny_model, rows, length):
    runner = Engine(tiny_model, rows=rows, length=length, kernels="torch", chunk=512).runner
    assert runner.cache_bytes <= 1.1 * rows * length * runner.cache_bytes_per_token


def eagerly(self, columns, is_adapted=False):
    """A step of decoding with everything made anew and every row gathered. Only the lines that nobody decodes are as
    there: how many tokens an expert is given decides how its products are rounded."""
    bucket, count = self._bucket(columns.shape[1]), columns.shape[1]
    is_whole = self._bucket(int(columns[0].max()) + 1) == bucket
    lines = torch.from_numpy(columns[0]).long() if is_whole else torch.arange(count)
    held = torch.arange(bucket) if is_whole else torch.full((bucket,), self.rows - 1)
    tokens, positions, targets = torch.zeros(3, bucket, dtype=torch.int64)
    held[lines], tokens[lines], positions[lines] = torch.from_numpy(columns[:3]).long()
    targets[:] = self.rows * self.cache.length
    targets[lines] = held[lines] * self.cache.length + positions[lines]
    places = self.cache.places(positions[:, None], targets, STEP_SLOTS, held)
    hidden, routings = self.model.trunk.routed(tokens[:, None], self.cache, places=places)
    experts = torch.stack([routing.experts[:, 0] for routing in routings], dim=1)
    return SimpleNamespace(logits=self.model.head(hidden[:, 0]).float(), experts=experts), lines


ASKED = [request(number) for number in range(20)]
ASKED += [request(number, sampling=CHOICES[number % 2], top_logprobs=None) for number in range(20)]  # all plain


def told(model, *, draws, runs_ahead=False):
    engine = Engine(model, rows=7, chunk=11, kernels="torch")
    engine.runner.draws, engine.runner.runs_ahead = draws, runs_ahead
    return answers(engine, [engine.submit(each) for each in ASKED])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_static_buffers_and_sampling_in_the_step_answer_as_the_eager_path_to_the_bit(tiny_model, monkeypatch, dtype):
    monkeypatch.setattr(cpu_runner, "can_draw", lambda: False)  # its sums are others
    model = tiny_model.to(dtype)
    got = told(model, draws=True)
    monkeypatch.setattr(TorchRunner, "_decode", eagerly)
    assert got == told(model, draws=False)


def test_a_step_that_was_begun_before_its_turn_answers_as_one_in_its_turn(tiny_model):
    """But for rounding: rows that have ended meanwhile run beside it."""
    for got, expected in zip(told(tiny_model, draws=True, runs_ahead=True), told(tiny_model, draws=True), strict=True):
        assert (got[1], *got[3:]) == (expected[1], *expected[3:])
        assert got[2] == pytest.approx(expected[2], abs=1e-4)


def test_steps_follow_each_other_without_a_wait_and_only_the_last_is_dropped(tiny_model, monkeypatch):
    steps, engine = [], Engine(tiny_model, rows=4, kernels="torch")
    engine.runner.draws = engine.runner.runs_ahead = True
    watched(monkeypatch, DecodeStep, "run", lambda _, step, columns, *__: steps.append(columns[1].tolist()))
    asked = [request(seed, prompt=[seed], max_tokens=20, sampling=GREEDY, **PLAIN) for seed in range(4)]
    answers(engine, [engine.submit(each) for each in asked])
    assert steps[1:] == [[-1] * 4] * 19


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch, views too, but for those of a graph."""

    count, is_in_graph = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not self.is_in_graph
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changes", "most"), [(PLAIN, 20), ({"sampling": SamplingConfig(top_p=0.9)}, 60), ({"top_logprobs": 2}, 60)]
)
def test_a_step_of_decoding_costs_few_operations_outside_its_graph(tiny_model, monkeypatch, changes, most):
    engine, operations, compute = Engine(tiny_model, rows=8, kernels="torch"), Operations(), DecodeStep.compute
    engine.runner.draws = engine.runner.runs_ahead = True
    monkeypatch.setattr(cpu_runner, "can_draw", lambda: False)

    def in_graph(step):
        operations.is_in_graph = True
        decoded = compute(step)
        operations.is_in_graph = False
        return decoded

    monkeypatch.setattr(DecodeStep, "compute", in_graph)
    for seed in range(8):
        engine.submit(request(seed, prompt=[seed], max_tokens=20, **({"sampling": GREEDY} | PLAIN | changes)))
    engine.step()
    engine.step()
    with operations:
        assert len(engine.step()) == 8
    assert 0 < operations.count <= most


@pytest.mark.parametrize(("asked", "is_copied"), [(8, False), (3, True)])
def test_rows_are_gathered_only_where_few_of_them_run(tiny_model, monkeypatch, asked, is_copied):
    held, engine = [], Engine(tiny_model, rows=8, kernels="torch")
    engine.free.extendleft(reversed([engine.free.pop() for _ in range(2)]))  # the last two rows are given out first
    for number in range(asked):
        engine.submit(request(number, prompt=[number], max_tokens=9, **PLAIN))
    engine.step()
    storage = engine.runner.cache.slots.untyped_storage().data_ptr()
    watched(monkeypatch, LatentCache, "write", lambda rows, *_: held.append(rows.untyped_storage().data_ptr()))
    engine.step()
    assert {each != storage for each in held} == {is_copied}


def test_a_model_in_training_decodes_alike_and_counts_no_token_for_its_experts(tiny_model):
    expected = told(tiny_model, draws=True)
    assert told(tiny_model.train(), draws=True) == expected
    assert all(layer.load.sum() == 0 for layer in tiny_model.moe_layers())


def test_samples_of_many_prompts_are_admitted_in_a_tenth_of_a_second(monkeypatch):
    """64 prompts of 150 tokens, 16 samples of each; the model itself takes no time here."""
    model = Transformer(dataclasses.replace(TINY, context_length=160, n_blocks=2)).eval()

    def run(batch):
        count = sum(len(chunk.wanted) for chunk in batch.chunks) + len(batch.rows)
        return ModelOutput(torch.zeros(count, TINY.vocab_size), torch.zeros(count, 1, 2, dtype=torch.int64))

    def timed(schedule=Engine._schedule_waiting):
        started = time.process_time()
        reused = schedule(engine)
        seconds[-1] += time.process_time() - started
        return reused

    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        engine = Engine(model, rows=1024, chunk=2048)
        monkeypatch.setattr(engine.runner, "run", run)
        monkeypatch.setattr(engine, "_schedule_waiting", timed)
        seconds.append(0.0)
        for number in range(1024):
            prompt = np.random.default_rng(number // 16).integers(0, 97, 150).tolist()
            engine.submit(Request(prompt=prompt, max_tokens=2, sampling=GREEDY))
        while engine.has_work:
            engine.step()
        assert engine.reused_tokens == 64 * 15 * 150
    assert min(seconds) < 0.1


class Recorder:
    """Stands for a CUDA graph: it computes again what was computed while it was captured, into the same places."""

    def replay(self):
        for place, value in zip(self.places, self.compute(), strict=True):
            place.copy_(value)


def test_a_bucket_that_is_often_used_is_captured_once_and_replayed(tiny_model, monkeypatch):
    expected, computed, compute = told(tiny_model, draws=True), [], DecodeStep.compute

    @contextmanager
    def graph(recorder, *, pool, capture_error_mode):
        computed.clear()
        yield
        ((step, recorder.places),) = computed
        recorder.compute = lambda: compute(step)

    def noting(step):
        computed.append((step, compute(step)))
        return computed[-1][1]

    monkeypatch.setattr(DecodeStep, "compute", noting)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    engine = Engine(tiny_model, rows=7, chunk=11, kernels="torch")
    engine.runner.draws, engine.runner.pool = True, object()
    assert answers(engine, [engine.submit(each) for each in ASKED]) == expected
    steps = engine.runner.steps.values()
    assert {(step.graph is not None, step.runs > CAPTURE_AFTER) for step in steps} == {(True, True), (False, False)}


def test_no_step_is_begun_early_where_a_prompt_ends_and_its_reply_joins(tiny_model, monkeypatch):
    steps, engine = [], Engine(tiny_model, rows=4, kernels="torch")
    engine.runner.draws = engine.runner.runs_ahead = True
    watched(monkeypatch, DecodeStep, "run", lambda _, step, columns, *__: steps.append(columns.shape[1]))
    for number in range(3):
        engine.submit(request(number, prompt=[number], max_tokens=6, sampling=GREEDY, **PLAIN))
        engine.step()
        engine.step()
    assert steps == [1, 1, 2, 2, 3, 3]  # each early step is used while the next prompt is read


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_the_memory_of_an_engine_is_free_as_soon_as_the_engine_is(tiny_model, kernels):
    """GRPO opens one for each step: a cache that waits for the garbage collector would lie beside the next one."""
    engine = Engine(tiny_model, rows=2, kernels=kernels)
    answers(engine, [engine.submit(request(0, **PLAIN))])
    runner = weakref.ref(engine.runner)
    gc.disable()
    try:
        del engine
        assert runner() is None
    finally:
        gc.enable()
