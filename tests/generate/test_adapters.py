"""Adapters beside one base: each row is answered as its merged model would, to the same bits in any company."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from nanollm.generate import cpu_runner, engine
from nanollm.generate.cpu_runner import NativeRunner
from nanollm.generate.engine import Engine
from nanollm.generate.request import PromptChunk, Request, ScheduledBatch
from nanollm.generate.runner import TorchRunner
from nanollm.model import lora
from nanollm.model.lora import TARGETS, merged, pairs_of, targeted
from nanollm.model.transformer import Transformer
from tests.generate.test_cpu_runner import CASES, LENGTH, SHAPES, decode, model_of, prefill, prompt
from tests.generate.test_engine import GREEDY, answers, request

SCALE = 1.5
OF_ROWS = (0, 1, 2, -1, 0, 1)  # the adapter of each row; the last two begin as the first two do


def trained(model, seed, rank, *targets):
    """The weights of an adapter that has learnt something."""
    rng, own = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    weights = {}
    for name in targeted(model, targets):
        *stack, outputs, inputs = own[name].shape
        weights[f"{name}.lora_A"] = torch.randn(*stack, rank, inputs, generator=rng) * inputs**-0.5
        weights[f"{name}.lora_B"] = torch.randn(*stack, outputs, rank, generator=rng) * 0.3 * rank**-0.5
    return weights


def adapters_of(model):
    """Of all matrices with an odd rank; of a rank beyond a panel on some; and where only one of two joined has one."""
    every = trained(model, 1, 3, *TARGETS, "head")
    return [every, trained(model, 2, 40, "kv_b_proj", "experts.up_proj"), trained(model, 3, 6, "q_a_proj", "down_proj")]


def pairs(model):
    return [lora.pairs_of(model, weights, SCALE) for weights in adapters_of(model)]


def merged_model(model, weights):
    other = Transformer(model.config).eval()
    other.load_state_dict(merged(model.state_dict() | weights, SCALE))
    return other


def talk(runner, rows, of_rows=OF_ROWS):
    """The logits that each of these rows is told: a prompt in two pieces while others reply, and replies."""
    told = {row: [] for row in rows}
    lengths = {row: 3 + 7 * row % 23 for row in range(6)}

    def run(pieces, replying):
        chunks = [PromptChunk(row, start, np.array(ids), True, of_rows[row]) for row, start, ids in pieces]
        columns = [(row, token, position, of_rows[row]) for row, token, position in replying]
        if chunks or columns:
            output = runner.run(ScheduledBatch(chunks, *np.array(columns, dtype=np.int64).reshape(-1, 4).T))
            for row, logits in zip([each[0] for each in [*pieces, *replying]], output.logits, strict=True):
                told[row].append(logits)

    first, later = [row for row in rows if row % 2 == 0], [row for row in rows if row % 2]
    ids = {row: prompt(lengths[row] + 4, row % 4) for row in rows}
    run([(row, 0, ids[row]) for row in first], [])
    run([(row, 0, ids[row][:4]) for row in later], [(row, 5, len(ids[row])) for row in first])
    run([(row, 4, ids[row][4:]) for row in later], [(row, 6, len(ids[row]) + 1) for row in first])
    for step in range(2):
        run([], [(row, 7 + step, len(ids[row]) + 2 * (row in first) + step) for row in rows])
    return told


def an_adapter_answers_as_its_merged_model(shape) -> None:
    model = model_of(shape)
    for kind in (partial(NativeRunner, longest=2 * LENGTH), TorchRunner):
        got = talk(kind(model, 6, LENGTH, adapters=pairs(model)), range(6))
        for row in range(6):
            alone = merged_model(model, adapters_of(model)[OF_ROWS[row]] if OF_ROWS[row] >= 0 else {})
            expected = talk(NativeRunner(alone, 6, LENGTH, 2 * LENGTH), [row], [-1] * 6)
            torch.testing.assert_close(torch.stack(got[row]), torch.stack(expected[row]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_an_adapter_answers_as_its_merged_model(shape):
    an_adapter_answers_as_its_merged_model(shape)


@pytest.mark.parametrize(("shape", "dtype", "quantize"), CASES, ids=str)
@torch.inference_mode()
def test_several_in_one_batch_are_each_alone_to_the_bit(shape, dtype, quantize):
    model = model_of(shape, dtype)

    def runner(*adapters):
        return NativeRunner(model, 6, LENGTH, 2 * LENGTH, quantize, adapters)

    every = pairs(model)
    together = talk(runner(*every), range(6))
    for row, number in enumerate(OF_ROWS):  # alone: no other row, and no other adapter
        own = [every[number]] if number >= 0 else []
        alone = talk(runner(*own), [row], [len(own) - 1] * 6)
        assert torch.equal(torch.stack(together[row]), torch.stack(alone[row]))
    assert not torch.allclose(together[0][0], talk(runner(*every), [0], [-1] * 6)[0][0], atol=0.1)


@torch.inference_mode()
def test_pieces_copies_and_threads_change_no_bit():
    model, ids = model_of("preset", torch.bfloat16), prompt(41)
    whole = NativeRunner(model, 6, LENGTH, 2 * LENGTH, adapters=pairs(model))
    expected = whole.run(prefill((0, 0, ids, 0))).logits
    pieced = NativeRunner(model, 6, LENGTH, 2 * LENGTH, adapters=pairs(model))
    for start, end in ((0, 13), (13, 40), (40, 41)):
        seen = pieced.run(prefill((0, start, ids[start:end], 0), (1, start, ids[start:end], 2)))
    assert torch.equal(seen.logits[:1], expected)
    pieced.copy(0, [5], 33)
    assert torch.equal(pieced.run(prefill((5, 33, ids[33:], 0))).logits, expected)
    again = whole.run(decode((1, 7, 0, 1), (0, 7, 41, 0))).logits
    assert torch.equal(again[1:], pieced.run(decode((5, 7, 41, 0))).logits)
    threads, told = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            told.append(talk(whole, range(6)))
    finally:
        torch.set_num_threads(threads)
    for other in told[1:]:
        assert all(torch.equal(torch.stack(other[row]), torch.stack(told[0][row])) for row in range(6))


# The engine: who gets which adapter, and what is read only once.

NAMES = ("every", "some", "few")


def engine_of(model, rows, **settings):
    return Engine(model, rows=rows, adapters=dict(zip(NAMES, pairs(model), strict=True)), **settings)


def requests_are_answered_as_if_alone() -> None:
    model = model_of("tiny")
    asked = [request(number // 4, adapter=(None, *NAMES)[number % 4]) for number in range(40)]  # each of all four
    crowd = engine_of(model, 5, chunk=11)
    got = answers(crowd, [crowd.submit(each) for each in asked])
    for each, answer in zip(asked, got, strict=True):
        alone = engine_of(model, 1)
        assert answers(alone, [alone.submit(each)]) == [answer]


def test_requests_are_answered_as_if_alone():
    requests_are_answered_as_if_alone()


def test_replies_are_those_of_the_merged_bundle_on_either_runner():
    model = model_of("tiny")
    asked = [request(number, sampling=GREEDY, top_logprobs=None) for number in range(12)]
    for kernels in ("native", "torch"):
        engine = engine_of(model, 5, kernels=kernels)
        owners = [(None, *NAMES)[number % 4] for number in range(12)]
        both = zip(asked, owners, strict=True)
        got = answers(engine, [engine.submit(dataclasses.replace(each, adapter=own)) for each, own in both])
        for number, weights in enumerate([{}, *adapters_of(model)]):
            alone = Engine(merged_model(model, weights), rows=5)
            expected = answers(alone, [alone.submit(each) for each in asked[number::4]])
            assert [each[1] for each in got[number::4]] == [each[1] for each in expected]


def test_a_prefix_is_read_once_for_each_adapter():
    engine = engine_of(model_of("tiny"), 4)
    for adapter in (None, "few", None, "few", "some"):
        answers(engine, [engine.submit(Request(prompt=[*range(30)], max_tokens=1, adapter=adapter))])
    assert (engine.prompt_tokens, engine.reused_tokens) == (3 * 30, 2 * 30)


def test_the_models_weights_are_its_own_again_after_a_pass():
    model = model_of("tiny")
    before = {name: (each.data_ptr(), each.clone()) for name, each in model.named_parameters()}
    engine = engine_of(model, 2, kernels="torch")
    answers(engine, [engine.submit(Request(prompt=[1, 2], max_tokens=2, adapter="every"))])
    for name, each in model.named_parameters():
        assert each.data_ptr() == before[name][0]
        assert torch.equal(each, before[name][1])


# Known bugs, put back.


def test_bug_a_prefix_of_another_adapter_is_reused(monkeypatch):
    keys_of = engine.keys_of
    monkeypatch.setattr(engine, "keys_of", lambda prompt, adapter: keys_of(prompt, -1))
    with pytest.raises(AssertionError):
        requests_are_answered_as_if_alone()


def transposed(pair, c):
    own = lora.per_head(pair, c)
    return own and own | {"key_up": (own["key_up"][0], pair[0].reshape(pair[0].T.shape))}


def without_experts(self, weight, expert=None):
    return [each.get(id(weight)) if expert is None else None for each in self.adapters]


def of_the_first_expert(self, weight, expert=None):
    own = [each.get(id(weight)) for each in self.adapters]
    return own if expert is None else [pair and (pair[0][0], pair[1][0]) for pair in own]


BUGS = [
    (cpu_runner, "per_head", transposed),
    (NativeRunner, "_pairs", without_experts),
    (NativeRunner, "_pairs", of_the_first_expert),
    (lora, "pairs_of", lambda model, weights, scale: pairs_of(model, weights, 1.0)),
]


@pytest.mark.parametrize(("owner", "name", "bug"), BUGS, ids=["transposed", "no experts", "one expert's", "no scale"])
@torch.inference_mode()
def test_bug_a_pair_is_not_that_of_its_matrix(monkeypatch, owner, name, bug):
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError):
        an_adapter_answers_as_its_merged_model("tiny")


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"trunk.blocks.1.ffn.centroids": ((3, 40), (5, 3))},
            "centroids, which only a merged model can; .* nanollm merge",
        ),
        ({"trunk.embed.weight": ((3, 40), (97, 3))}, "it adapts trunk.embed.weight"),
        ({"trunk.blocks.9.ffn.w1": ((3, 40), (5, 3))}, "no whole pair for a matrix trunk.blocks.9.ffn.w1"),
        ({"trunk.norm.weight": ((3, 40), (5, 3))}, "no whole pair for a matrix trunk.norm.weight"),
        ({"head.weight": ((3, 40), (96, 3))}, r"A and B do not fit head.weight: \(3, 40\), \(96, 3\), \(97, 40\)"),
        ({"head.weight": ((3, 40), (97, 2))}, "A and B do not fit head.weight"),
        ({"head.weight": ((2, 3, 40), (2, 97, 3))}, "A and B do not fit head.weight"),
    ],
)
def test_an_adapter_without_a_place_is_refused(change, message):
    weights = {
        f"{name}.lora_{end}": torch.ones(shape)
        for name, both in change.items()
        for end, shape in zip("AB", both, strict=True)
    }
    with pytest.raises(ValueError, match=message):
        pairs_of(model_of("tiny"), weights, 1.0)


def test_a_request_for_an_unknown_adapter_is_refused():
    engine = engine_of(model_of("tiny"), 1)
    with pytest.raises(ValueError, match="there is no adapter 'other', only every, some, few"):
        engine.submit(Request(prompt=[1], max_tokens=1, adapter="other"))
