"""An interval of 95 % holds the truth in about 95 of 100 evaluations."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from nanollm.evals.stats import (
    Mean,
    apart,
    average,
    difference_interval,
    mcnemar,
    mean_interval,
    paired,
    pass_at_k,
    ratio,
    student,
    wilson,
)


def binomial(n: int, p: float) -> list[float]:
    """The probability of each number of successes."""
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


# --- one share ---


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_values_of_the_textbook(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (3, 10), (50, 100), (499, 500)])
def test_wrong_answers_have_the_mirrored_interval(correct, n):
    low, high = wilson(correct, n)
    mirrored_low, mirrored_high = wilson(n - correct, n)
    assert (1 - high, 1 - low) == pytest.approx((mirrored_low, mirrored_high))
    assert 0 <= low <= correct / n <= high <= 1


def test_an_interval_ends_at_nothing_only_where_nothing_was_correct():
    assert wilson(0, 50)[0] == 0.0 < wilson(0, 50)[1]
    assert wilson(50, 50)[1] == 1.0 > wilson(50, 50)[0]
    assert wilson(1, 50)[0] > 0


@pytest.mark.parametrize("n", [50, 100, 200, 500])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_wilson_holds_the_truth_in_93_to_97_of_100(n, share):
    held = sum(p for k, p in enumerate(binomial(n, share)) if wilson(k, n)[0] <= share <= wilson(k, n)[1])
    assert 0.93 <= held <= 0.971


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_no_problems_and_impossible_counts_are_refused(correct, n):
    with pytest.raises(ValueError, match=rf"at least one problem .*, got {correct} of {n}"):
        wilson(correct, n)


# --- two models on the same problems ---


def test_the_paired_interval_gives_the_values_of_a_statistics_package():
    assert difference_interval(26, 4, 48) == pytest.approx((0.2548067, 0.6251933), abs=5e-8)  # R: statpsych::ci.prop.ps


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(1, 7, 18 / 256), (0, 5, 2 / 32), (5, 5, 1.0), (0, 0, 1.0), (6, 16, 0.052478790)],
)
def test_mcnemar_is_the_binomial_test_of_the_problems_that_differ(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == pytest.approx(p)


def test_mcnemar_neither_underflows_nor_takes_long():
    assert mcnemar(20_000, 20_000) == 1.0
    assert 0 <= mcnemar(0, 5_000) < 1e-300


def test_paired_counts_who_solved_what_the_other_did_not():
    first = [True, True, True, False, False, True]
    second = [True, False, False, True, False, False]
    result = paired(first, second)
    assert (result.only_first, result.only_second, result.n) == (3, 1, 6)
    assert result.difference == pytest.approx(2 / 6)
    assert result.low <= result.difference <= result.high


def test_models_in_the_other_order_give_the_difference_with_the_other_sign():
    rng = np.random.default_rng(0)
    first, second = (rng.random(80) < 0.6).tolist(), (rng.random(80) < 0.4).tolist()
    there, back = paired(first, second), paired(second, first)
    assert (back.difference, back.low, back.high, back.p) == pytest.approx(
        (-there.difference, -there.high, -there.low, there.p)
    )


def test_two_models_that_never_differ_still_leave_some_doubt():
    result = paired([True, False] * 50, [True, False] * 50)
    assert result.low < result.difference == 0 < result.high
    assert result.p == 1.0


@pytest.mark.parametrize("n", [50, 200, 500])
@pytest.mark.parametrize(("only_first", "only_second"), [(0.2, 0.1), (0.3, 0.05), (0.3, 0.2), (0.4, 0.1)])
def test_the_paired_interval_holds_the_truth_in_95_to_97_of_100(n, only_first, only_second):
    held = sum(
        p
        for b, c, p in trinomial(n, only_first, only_second)
        if difference_interval(b, c, n)[0] <= only_first - only_second + 1e-12
        and difference_interval(b, c, n)[1] >= only_first - only_second - 1e-12
    )
    assert 0.95 <= held <= 0.97


def trinomial(n: int, p: float, q: float) -> Iterator[tuple[int, int, float]]:
    """Both counts and their probability, where that is not negligible."""
    log = [math.lgamma(i + 1) for i in range(n + 1)]
    for b in range(n + 1):
        for c in range(n + 1 - b):
            rest = n - b - c
            chance = log[n] - log[b] - log[c] - log[rest] + b * math.log(p) + c * math.log(q)
            chance += rest * math.log(1 - p - q)
            if chance > -30:
                yield b, c, math.exp(chance)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_models_are_compared_on_the_same_problems_only(first, second):
    with pytest.raises(ValueError, match=rf"the same problems, at least one; got {len(first)} and {len(second)}"):
        paired(first, second)


# --- pass@k ---


def test_pass_at_k_equals_the_share_of_all_choices_of_k_tries_that_hold_a_right_one():
    estimate = pass_at_k([0, 1, 3, 5], samples=5, k=2).value
    assert estimate == pytest.approx((0 + 4 / 10 + 9 / 10 + 1) / 4)  # of the 10 pairs of 5 tries


def test_pass_at_1_is_the_share_of_right_tries_and_pass_at_all_that_of_solved_problems():
    correct = [0, 2, 8, 3, 0]
    assert pass_at_k(correct, 8, 1).value == pytest.approx(sum(correct) / 40)
    assert pass_at_k(correct, 8, 8).value == pytest.approx(3 / 5)


def test_pass_at_k_is_unbiased():
    chance, samples = 0.3, 6
    for k in (1, 2, 4, 6):
        expected = sum(p * pass_at_k([c], samples, k).value for c, p in enumerate(binomial(samples, chance)))
        assert expected == pytest.approx(1 - (1 - chance) ** k)


@pytest.mark.parametrize("correct", [[0], [1], [0, 0, 0], [1, 1, 1], [1, 0, 0, 1, 0, 0, 0]])
def test_with_one_sample_it_is_wilsons_interval(correct):
    mean = pass_at_k(correct, 1, 1)
    assert (mean.low, mean.high) == pytest.approx(wilson(sum(correct), len(correct)))


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("n", [50, 500])
@pytest.mark.parametrize("shape", [(0.5, 2.0), (0.5, 0.5), (2.0, 2.0)], ids=["hard", "easy or hard", "even"])
def test_the_interval_of_pass_at_k_holds_the_truth_in_93_to_97_of_100(n, k, shape):
    assert 0.93 <= coverage(n, k, shape) <= 0.97


def test_where_nearly_all_is_solved_the_interval_keeps_its_word_and_the_normal_one_does_not():
    assert coverage(200, 8, (20.0, 20.0), of="normal") < 0.8
    assert coverage(200, 8, (20.0, 20.0)) > 0.93


def coverage(n: int, k: int, shape: tuple[float, float], of: str = "ours", samples: int = 8, runs: int = 1500) -> float:
    """The share of simulated evaluations whose interval holds the truth; a problem's chance is Beta(shape)."""
    rng = np.random.default_rng(0)
    a, b = shape
    truth = 1 - math.exp(math.lgamma(b + k) - math.lgamma(a + b + k) - math.lgamma(b) + math.lgamma(a + b))
    estimate = np.array([pass_at_k([c], samples, k).value for c in range(samples + 1)])
    held = 0
    for _ in range(runs):
        values = estimate[rng.binomial(samples, rng.beta(a, b, n))]
        if of == "normal":
            low, high = values.mean() + np.array([-1.96, 1.96]) * values.std(ddof=1) / math.sqrt(n)
        else:
            mean = mean_interval(values.tolist(), samples)
            low, high = mean.low, mean.high
        held += low <= truth <= high
    return held / runs


@pytest.mark.parametrize(("samples", "k"), [(8, 0), (8, 9), (0, 1)])
def test_more_tries_than_samples_are_refused(samples, k):
    with pytest.raises(ValueError, match=f"k from 1 to the samples per problem, got k {k} of {samples} samples"):
        pass_at_k([0], samples, k)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one problem, got none"):
        pass_at_k([], 8, 1)


# --- a ratio of sums over documents ---


def test_a_ratio_has_the_interval_of_the_jackknife():
    bits, sizes = [30.0, 50.0, 8.0], [20.0, 40.0, 10.0]
    value = 88 / 70
    without = [(58 / 50), (38 / 30), (80 / 60)]
    stderr = math.sqrt(2 / 3 * sum((each - value) ** 2 for each in without))
    found = ratio(bits, sizes)
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx((value - 4.3027 * stderr, value + 4.3027 * stderr))


def test_of_documents_of_one_size_it_is_the_t_interval_of_their_mean():
    values = [1.0, 2.0, 4.0, 3.0, 2.5, 0.5]
    half = 2.5706 * np.std(values, ddof=1) / math.sqrt(6)
    found = ratio(values, [1.0] * 6)
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=2e-3)


def test_one_document_has_a_ratio_and_no_interval():
    found = ratio([3.0], [2.0])
    assert (found.value, found.low, found.high) == (1.5, None, None)


@pytest.mark.parametrize(("tops", "bottoms"), [([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0])])
def test_a_ratio_of_nothing_is_refused(tops, bottoms):
    with pytest.raises(ValueError, match=rf"a top and a bottom above 0 .*, got {len(tops)} and {len(bottoms)}"):
        ratio(tops, bottoms)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (49, 2.0096)])
def test_students_t_is_that_of_the_tables(freedom, expected):
    assert student(freedom) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize("n", [10, 50, 200])
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_the_interval_of_a_ratio_holds_the_truth_in_88_to_97_of_100(n, spread):
    rng = np.random.default_rng(0)
    truth, held = 1.2 * math.exp(0.25**2 / 2), 0
    for _ in range(500):
        sizes = rng.lognormal(7, spread, n)  # with 1, a twentieth of the documents is a quarter of the text
        found = ratio((sizes * 1.2 * np.exp(0.25 * rng.standard_normal(n))).tolist(), sizes.tolist())
        held += found.low <= truth <= found.high
    assert 0.88 <= held / 500 <= 0.97


# --- a mean of several figures ---


def share(correct, n):
    return Mean(correct / n, *wilson(correct, n))


def test_a_mean_of_independent_figures_adds_up_squares_and_one_of_the_same_documents_adds_up_lengths():
    a, b = Mean(0.5, 0.2, 0.9), Mean(0.1, 0.0, 0.4)
    alone = average([[a], [b]])
    assert (alone.value, alone.low, alone.high) == pytest.approx(
        (0.3, 0.3 - math.hypot(0.3, 0.1) / 2, 0.3 + math.hypot(0.4, 0.3) / 2)
    )
    together = average([[a, b]])
    assert (together.value, together.low, together.high) == pytest.approx((0.3, 0.1, 0.65))


def test_a_scale_has_its_0_and_its_1_where_it_is_told():
    assert Mean(0.4, 0.25, 1.0).scaled(0.25, 1) == Mean(pytest.approx(0.2), 0.0, 1.0)


def test_the_mean_of_tasks_holds_the_truth_in_93_to_98_of_100():
    rng = np.random.default_rng(0)
    sizes, chances = [500, 1319, 32, 100, 2000, 210], [0.25, 0.5, 0.0, 0.5, 0.0, 0.2]
    shares = [0.3, 0.52, 0.02, 0.55, 0.004, 0.2]
    truth = np.mean([(p - c) / (1 - c) for p, c in zip(shares, chances, strict=True)])
    held = 0
    for _ in range(500):
        correct = rng.binomial(sizes, shares)
        found = average([[share(k, n).scaled(c, 1)] for k, n, c in zip(correct, sizes, chances, strict=True)])
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 500 <= 0.98


def test_the_difference_of_two_groups_holds_the_truth_in_93_to_97_of_100():
    held = sum(
        p * q
        for a, p in enumerate(binomial(200, 0.3))
        for b, q in enumerate(binomial(20, 0.5))
        if (found := apart(share(a, 200), share(b, 20))).low <= -0.2 <= found.high
    )
    assert 0.93 <= held <= 0.97


def test_a_mean_of_no_figures_is_refused():
    with pytest.raises(ValueError, match="at least one figure, got none"):
        average([])
