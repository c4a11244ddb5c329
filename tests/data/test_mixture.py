from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.data.mixture import PERIOD, Mixture, parts_of

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(weights=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_at_every_moment_each_source_has_its_share_to_within_one(weights):
    sources, _ = Mixture(weights).draws(0, 2 * sum(weights))
    for source, weight in enumerate(weights):
        given_so_far = (sources == source).cumsum()
        due = [Fraction(weight * (place + 1), sum(weights)) for place in range(len(sources))]
        assert all(abs(count - share) < 1 for count, share in zip(given_so_far.tolist(), due, strict=True))


@given(weights=WEIGHTS, first=st.integers(0, 10**9), count=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_any_stretch_is_known_without_what_came_before(weights, first, count):
    mixture = Mixture(weights)
    near = first % 1000
    sources, draws = (numbers[near:] for numbers in mixture.draws(0, near + count))
    assert [part.tolist() for part in mixture.draws(near, count)] == [sources.tolist(), draws.tolist()]
    far_sources, far_draws = mixture.draws(first, count)
    for source in range(len(weights)):
        chosen = far_draws[far_sources == source]
        assert (np.diff(chosen) == 1).all()  # each source goes on where it was
        if len(chosen):
            share = (first + int((far_sources == source).argmax())) * weights[source] / sum(weights)
            assert abs(chosen[0] - share) < 1


def test_weights_need_not_sum_to_one_and_fractions_are_exact():
    assert parts_of([0.7, 0.3]) == [7, 3]
    assert parts_of([14.0, 6.0]) == [7, 3]
    assert parts_of([1e-3, 0.999]) == [1, 999]
    assert parts_of([5]) == [1]
    sources, _ = Mixture([0.7, 0.3]).draws(0, 1000)
    assert Counter(sources.tolist()) == {0: 700, 1: 300}


def test_very_uneven_weights_are_rounded_and_no_source_is_lost():
    parts = parts_of([2_000_000, 7_384, 1])
    assert sum(parts) == pytest.approx(PERIOD, abs=2)
    assert parts[1] / sum(parts) == pytest.approx(7_384 / 2_007_385, abs=1 / PERIOD)
    assert parts[2] == 1


@pytest.mark.parametrize("weight", [0.0, -0.5, float("nan"), float("inf")])
def test_a_weight_that_is_not_above_zero_is_refused(weight):
    with pytest.raises(ValueError, match=r"a weight of a mixture must be above 0, got .*; leave out"):
        Mixture([0.5, weight])
