from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.data.order import PERIOD, Mixture, mixed_indices, parts_of, permute, sample_indices

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(n=st.integers(1, 3000), seed=st.integers())
def test_every_number_comes_exactly_once(n, seed):
    assert sorted(permute(np.arange(n), n, seed)) == list(range(n))


@given(n=st.integers(1, 2**40), seed=st.integers(), data=st.data())
def test_one_number_goes_where_it_goes_in_company(n, seed, data):
    numbers = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9))
    together = permute(np.array([numbers, numbers]), n, seed)
    assert together.shape == (2, len(numbers)) and together.dtype == np.int64
    assert together[0].tolist() == [int(permute(number, n, seed)) for number in numbers]
    assert together.min() >= 0 and together.max() < n


def test_all_orders_of_few_windows_occur():
    for n in (2, 3, 4):
        seen = {tuple(permute(np.arange(n), n, seed).tolist()) for seed in range(500)}
        assert seen == set(permutations(range(n)))


@pytest.mark.parametrize("n", [10_000, 65_536, 99_991])
def test_the_order_is_well_mixed(n):
    """Neighbours are no nearer, and halves no fuller, than chance has it (bounds of five standard deviations)."""
    order = permute(np.arange(n), n, seed=7)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(n)
    assert (order == np.arange(n)).sum() < 10
    from_the_low_half = (order[: n // 2] < n // 2).sum()
    assert abs(from_the_low_half - n / 4) < 5 * np.sqrt(n) / 4
    near = (np.abs(np.diff(order)) < n // 100).mean()
    assert near == pytest.approx(0.02, abs=5 * np.sqrt(0.02 / n))


@given(n=st.integers(1, 50), batch=st.integers(1, 20), epoch=st.integers(0, 5), seed=st.integers(0, 9))
def test_each_epoch_sees_every_window_once_whatever_the_batch(n, batch, epoch, seed):
    steps = -(-(epoch + 1) * n // batch)
    samples = np.concatenate([sample_indices(step, batch, n, seed) for step in range(steps)])
    assert sorted(samples[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_the_batch_size_does_not_change_the_order():
    one_by_one = np.concatenate([sample_indices(step, 1, 100, seed=3) for step in range(240)])
    by_sixty = np.concatenate([sample_indices(step, 60, 100, seed=3) for step in range(4)])
    assert one_by_one.tolist() == by_sixty.tolist()


def test_epochs_and_seeds_differ():
    first, second = sample_indices(0, 1000, 1000, seed=1), sample_indices(1, 1000, 1000, seed=1)
    assert (first == second).mean() < 0.02
    assert (first == sample_indices(0, 1000, 1000, seed=2)).mean() < 0.02


def test_the_order_of_today_is_the_order_of_tomorrow():
    """A run that resumes under a newer version must meet the same windows: these numbers may never change."""
    assert permute(np.arange(10), 10, seed=1).tolist() == ORDER_10
    assert sample_indices(12_345, 4, 1_000_003, seed=42).tolist() == SAMPLES


@pytest.mark.parametrize(("index", "n"), [(5, 5), (-1, 5), (0, 0)])
def test_a_number_outside_is_refused(index, n):
    with pytest.raises(ValueError, match=r"must lie in \[0, "):
        permute(index, n, seed=0)


ORDER_10 = [0, 2, 9, 4, 8, 1, 7, 5, 3, 6]
SAMPLES = [117944, 638752, 799317, 609500]


# Several sources.


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


@pytest.mark.parametrize("weights", [[0.5, -0.5], [0.5, float("nan")], [0.5, float("inf")], [0.0, 0.0]])
def test_weights_below_zero_and_none_above_it_are_refused(weights):
    with pytest.raises(ValueError, match="the weights of a mixture must be 0 or more, and one above 0, got"):
        Mixture(weights)


def test_after_another_mixture_every_source_goes_on_where_it_was_left():
    first = Mixture([3, 1, 0])
    second = Mixture([0, 1, 1], after=first, begins=6)
    third = Mixture([1, 0, 0], after=second, begins=13)
    sources, draws = (
        np.concatenate(parts)
        for parts in zip(third.draws(0, 6), third.draws(6, 5), third.draws(11, 2), third.draws(13, 9), strict=True)
    )
    assert sources[:6].tolist() == first.draws(0, 6)[0].tolist()

    assert set(sources[6:13].tolist()) == {1, 2}
    assert set(sources[13:].tolist()) == {0}
    for source in range(3):
        assert draws[sources == source].tolist() == list(range((sources == source).sum()))
    for count in range(22):
        assert third.drawn(count).tolist() == np.bincount(sources[:count], minlength=3).tolist()


def test_very_uneven_weights_beside_none_are_rounded_and_none_stays_none():
    assert parts_of([2_000_000, 7_384, 0])[2] == 0


def test_every_source_has_an_order_of_its_own_and_the_first_that_of_a_source_alone():
    sources, numbers = mixed_indices(0, 200, [100, 100], Mixture([1, 1]), seed=3)
    first, second = numbers[sources == 0], numbers[sources == 1]
    assert sorted(first) == sorted(second) == list(range(100))
    assert (first == second).mean() < 0.1
    assert first.tolist() == sample_indices(0, 100, 100, seed=3).tolist()
