from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollm.data.order import permute, sample_indices


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
