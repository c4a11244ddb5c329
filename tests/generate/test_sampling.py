"""The sampled distribution is the one that was asked for."""

import numpy as np
import pytest
import torch

from nanollm.generate.sampling import SamplingConfig, filter_logits, invert, sample, shift, uniforms

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def kept(**settings):
    return torch.isfinite(filter_logits(LOGITS[None], SamplingConfig(**settings)))[0].tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [True, True, True, True]),
        ({"top_k": 2}, [True, True, False, False]),
        ({"top_k": 9}, [True, True, True, True]),
        ({"top_p": 0.01}, [True, False, False, False]),
        ({"top_p": 0.6}, [True, True, False, False]),
        ({"top_p": 0.81}, [True, True, True, False]),
        ({"min_p": 0.2}, [True, True, True, False]),  # at least 0.1
        ({"min_p": 1.0}, [True, False, False, False]),
        ({"top_k": 3, "min_p": 0.5}, [True, True, False, False]),
        ({"top_k": 2, "top_p": 0.6}, [True, False, False, False]),  # top-p of what top-k left: 0.625 reaches 0.6
    ],
)
def test_top_k_and_top_p_keep_the_most_likely(settings, expected):
    assert kept(**settings) == expected


def test_frequencies_follow_the_tempered_probabilities():
    rows = 20_000
    numbers = uniforms(np.arange(rows), np.full(rows, 3))
    drawn, logprobs = sample(LOGITS.expand(rows, 4), SamplingConfig(temperature=2.0), numbers)
    expected = (LOGITS / 2).softmax(-1)
    torch.testing.assert_close(logprobs, expected.log()[drawn])
    torch.testing.assert_close(drawn.bincount(minlength=4) / rows, expected, atol=0.015, rtol=0)


def test_temperature_zero_takes_the_most_likely():
    ids, logprobs = sample(LOGITS.expand(5, 4), SamplingConfig(temperature=0), torch.zeros(5))
    assert ids.tolist() == [0] * 5
    torch.testing.assert_close(logprobs, LOGITS[:1].expand(5))


def test_numbers_of_neighbouring_seeds_and_draws_are_uniform_and_unrelated():
    seeds, draws = np.meshgrid(np.arange(200), np.arange(200), indexing="ij")
    numbers = uniforms(seeds.ravel(), draws.ravel()).reshape(200, 200)
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    torch.testing.assert_close(
        numbers.flatten().histc(20, 0, 1) / numbers.numel(), torch.full((20,), 0.05), atol=0.005, rtol=0
    )
    for neighbour in (numbers.roll(1, 0), numbers.roll(1, 1), numbers.T):
        assert abs(torch.corrcoef(torch.stack((numbers.flatten(), neighbour.flatten())))[0, 1]) < 0.02


def test_a_token_without_probability_is_never_drawn():
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(4, 5)
    numbers = torch.tensor([0.0, 0.3, 0.299, 1 - 2**-24])
    assert invert(probabilities, numbers).tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* or at least 0.0001, got -0.1"),
        ({"temperature": 1e-300}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"min_p": 1.1}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias must map token ids to finite numbers"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must map token ids to finite numbers"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)


def test_a_bias_moves_a_token_and_leaves_the_logprob_to_the_model():
    greedy = SamplingConfig(temperature=0, logit_bias={3: 5.0})
    ids, logprobs = sample(LOGITS[None], greedy, torch.zeros(1))
    assert ids.tolist() == [3]
    assert logprobs.item() == pytest.approx(np.log(0.05), abs=1e-6)
    never = SamplingConfig(temperature=1.0, logit_bias={0: -100.0})
    drawn = sample(LOGITS.expand(1000, -1), never, torch.rand(1000))[0]
    assert 0 not in drawn.tolist()


def test_the_repetition_penalty_falls_on_what_was_seen_in_that_row():
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1], [2.0, 1.9, -1.0, -1.1]])
    penalised = SamplingConfig(temperature=0, repetition_penalty=1.3)
    ids, _ = sample(logits, penalised, torch.zeros(2), [torch.tensor([0]), torch.tensor([3])])
    assert ids.tolist() == [1, 0]
    shifted = shift(logits, penalised, [torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64)])
    assert shifted[0].tolist() == pytest.approx([2.0 / 1.3, 1.9, -1.3, -1.1])
    assert torch.equal(shifted[1], logits[1])
