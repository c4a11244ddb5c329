"""The sampled distribution is the one that was asked for."""

import pytest
import torch

from nanollm.generate.sampling import SamplingConfig, keep_likeliest, sample

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def kept(**settings):
    return torch.isfinite(keep_likeliest(LOGITS[None], SamplingConfig(**settings)))[0].tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [True, True, True, True]),
        ({"top_k": 2}, [True, True, False, False]),
        ({"top_k": 9}, [True, True, True, True]),
        ({"top_p": 0.01}, [True, False, False, False]),
        ({"top_p": 0.6}, [True, True, False, False]),
        ({"top_p": 0.81}, [True, True, True, False]),
        ({"top_k": 2, "top_p": 0.6}, [True, False, False, False]),  # top-p of what top-k left: 0.625 reaches 0.6
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(settings, expected):
    assert kept(**settings) == expected


def test_top_p_keeps_the_likeliest_wherever_they_stand():
    shuffled = LOGITS[[3, 0, 2, 1]]
    assert torch.isfinite(keep_likeliest(shuffled[None], SamplingConfig(top_p=0.6)))[0].tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_frequencies_follow_the_tempered_probabilities():
    rows = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS.expand(rows, 4), SamplingConfig(temperature=2.0), [generator] * rows)
    expected = (LOGITS / 2).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / rows, expected, atol=0.015, rtol=0)


def test_temperature_zero_takes_the_likeliest():
    assert sample(LOGITS.expand(5, 4), SamplingConfig(temperature=0), []).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)
