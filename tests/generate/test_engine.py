"""The engine answers as the model alone would, for every row as if it were the only one."""

import numpy as np
import pytest
import torch

from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig, sample, uniforms

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[5, 9, 3, 44, 7, 60, 2], [11], [8, 8, 1]]


def without_cache(model, prompt, sampling, max_tokens, end_ids=frozenset(), seed=0):
    """Read everything anew for each token: slow and plain."""
    ids = list(prompt)
    for drawn in range(max_tokens):
        with torch.no_grad():
            numbers = uniforms(np.array([seed]), np.array([drawn]))
            token = sample(model(torch.tensor([ids]))[:, -1], sampling, numbers)[0].item()
        if token in end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0, top_k=20, top_p=0.9)], ids=str)
def test_cache_and_batch_change_nothing(tiny_model, sampling):
    expected = [without_cache(tiny_model, p, sampling, 24, seed=3 + row) for row, p in enumerate(PROMPTS)]
    got = generate(tiny_model, PROMPTS, sampling, max_tokens=24, end_ids=frozenset(), seed=3)
    assert [completion.ids for completion in got] == expected


def test_the_prompt_is_really_used(tiny_model):
    first, second = generate(tiny_model, [[5, 9, 3], [6, 9, 3]], GREEDY, max_tokens=16, end_ids=frozenset())
    assert first.ids != second.ids


def test_rows_that_end_early_leave_the_others_alone(tiny_model):
    alone = without_cache(tiny_model, PROMPTS[1], GREEDY, 24)
    end = alone[4]
    expected = [without_cache(tiny_model, prompt, GREEDY, 24, frozenset({end})) for prompt in PROMPTS]
    got = generate(tiny_model, PROMPTS, GREEDY, max_tokens=24, end_ids=frozenset({end}))
    assert [completion.ids for completion in got] == expected
    assert got[1].finish == "end"
    assert len(got[1].ids) == alone.index(end)


def test_a_stop_function_ends_its_row(tiny_model):
    def at_the_third():
        told = []

        def stop(token):
            told.append(token)
            return len(told) == 3

        return stop

    free = generate(tiny_model, PROMPTS, GREEDY, max_tokens=9, end_ids=frozenset())
    stopped = generate(tiny_model, PROMPTS, GREEDY, max_tokens=9, end_ids=frozenset(), stop=at_the_third)
    assert [c.ids for c in stopped] == [c.ids[:3] for c in free]
    assert {c.finish for c in stopped} == {"stop"}


def test_replies_end_where_the_context_ends(tiny_model):
    prompt = list(range(60))  # of 64
    (completion,) = generate(tiny_model, [prompt], GREEDY, max_tokens=50, end_ids=frozenset())
    assert len(completion.ids) == 5  # the last token is read by nobody and needs no place
    assert completion.finish == "length"
    assert completion.ids == without_cache(tiny_model, prompt, GREEDY, 5)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [
        ([[1] * 64], 5, "the prompt has 64 tokens, the model's context is 64"),
        ([[1] * 640], 5, "the prompt has 640 tokens"),
        ([], 5, "at least one prompt"),
        ([[1], []], 5, "no empty one"),
        ([[1]], 0, "max_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_continued_is_refused(tiny_model, prompts, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, prompts, GREEDY, max_tokens=max_tokens, end_ids=frozenset())


def test_the_model_is_left_in_the_mode_it_was_in(tiny_model):
    tiny_model.train()
    generate(tiny_model, [[1]], GREEDY, max_tokens=2, end_ids=frozenset())
    assert tiny_model.training
    assert all(layer.load.sum() == 0 for layer in tiny_model.moe_layers())


def test_every_sample_of_a_prompt_is_what_the_prompt_alone_gives(tiny_model):
    sampling = SamplingConfig(temperature=1.0)
    together = generate(tiny_model, PROMPTS, sampling, max_tokens=12, end_ids=frozenset({2}), seed=7, samples=4)
    for row, completion in enumerate(together):
        (alone,) = generate(
            tiny_model, [PROMPTS[row // 4]], sampling, max_tokens=12, end_ids=frozenset({2}), seed=7 + row
        )
        assert completion.ids == alone.ids
        assert completion.finish == alone.finish
    assert len({tuple(completion.ids) for completion in together[:4]}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_one_full_pass_at_the_same_temperature(tiny_model, temperature):
    sampling = SamplingConfig(temperature=temperature)
    ends = range(6)
    completions = generate(tiny_model, PROMPTS, sampling, max_tokens=20, end_ids=frozenset(ends), samples=3)
    assert {completion.finish for completion in completions} == {"end", "length"}
    for row, completion in enumerate(completions):
        prompt, drawn = PROMPTS[row // 3], len(completion.logprobs)
        assert drawn == len(completion.ids) + (completion.finish == "end")
        with torch.no_grad():
            logits = tiny_model(torch.tensor([[*prompt, *completion.ids]]))[0, len(prompt) - 1 :]  # (drawn or more, V)
        expected = (logits / temperature).log_softmax(-1).tolist()
        for place, token in enumerate(completion.ids):
            assert completion.logprobs[place] == pytest.approx(expected[place][token], abs=1e-5)
        if completion.finish == "end":
            assert any(completion.logprobs[-1] == pytest.approx(expected[drawn - 1][end], abs=1e-5) for end in ends)
