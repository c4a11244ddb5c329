"""Computes 95 % intervals of scores and of the difference between two models.

Each is meant to hold the true value in 95 % of all evaluations; tests/evals/test_stats.py counts how often it does.
Sources: one proportion, E. B. Wilson, JASA 22 (1927), 209-212. Two models on the same problems: the exact test of
McNemar (a sign test of the problems that only one of them solved), and the interval of D. G. Bonett and R. M. Price,
J. Educ. Behav. Stat. 37 (2012), 479-488. pass@k: arXiv:2107.03374, equation 1. A ratio of two sums: the jackknife,
R. G. Miller, Biometrika 61 (1974), 1-15. A mean of several figures, or the difference of two: the distances to the ends
of their intervals as if they were standard errors, G. Y. Zou, W. Huang and X. Zhang, Comput. Stat. Data Anal. 53
(2009), 1080-1085.
Letters: n problems, k of them or k tries, z the 97.5 % point of the normal distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

Z = NormalDist().inv_cdf(0.975)

Figures = dict[str, Any]
"""Numbers as a JSON file has them."""


def wilson(correct: float, n: float) -> tuple[float, float]:
    """Low and high end of the share of which `correct` of `n` was seen. n need not be whole: see mean_interval.

    At 0 of n it ends above 0, at n of n below 1, which the normal interval does not.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"an interval needs at least one problem and 0 to n correct ones, got {correct} of {n}")
    share, spread = correct / n, Z * Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4) / (1 + spread)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return 0.0 if correct == 0 else low, 1.0 if correct == n else high  # free of rounding at the ends


@dataclass(frozen=True)
class Paired:
    """How two models differ on the same n problems."""

    n: int
    only_first: int
    """Problems that only the first one solved."""
    only_second: int
    """Problems that only the second one solved."""
    low: float
    high: float
    p: float
    """Exact McNemar, two-sided: how often a difference this large comes about if neither model is better."""

    @property
    def difference(self) -> float:
        """Share of the first minus share of the second."""
        return (self.only_first - self.only_second) / self.n


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two models by whether they solved each of the same problems, in the same order."""
    if len(first) != len(second) or not first:
        raise ValueError(
            f"two models are compared on the same problems, at least one; got {len(first)} and {len(second)}"
        )
    n = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    low, high = difference_interval(only_first, only_second, n)
    return Paired(n, only_first, only_second, low, high, mcnemar(only_first, only_second))


def difference_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Low and high end of the difference of two paired shares: Bonett and Price's, one added to both counts.

    Its coverage was 95 % or more wherever it was enumerated, and it has a width where no two answers differ.
    """
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of this split, or one less even, if each of these problems was decided by a fair coin."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    ways = term = 1  # of choosing i of n, summed over i = 0 .. fewer; whole numbers, so nothing underflows
    for i in range(fewer):
        term = term * (n - i) // (i + 1)
        ways += term
    return min(1.0, 2 * ways / 2**n)


@dataclass(frozen=True)
class Mean:
    """A mean over problems, or of several figures, and its interval."""

    value: float
    low: float
    high: float

    def scaled(self, zero: float, one: float) -> "Mean":
        """The same on a scale on which `zero` is 0 and `one` is 1."""
        return Mean(*((each - zero) / (one - zero) for each in (self.value, self.low, self.high)))


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> Mean:
    """The chance that at least one of k tries is right, over problems of which correct[i] of `samples` were.

    Per problem 1 - C(samples - c, k) / C(samples, k), which is unbiased for every k up to `samples`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs k from 1 to the samples per problem, got k {k} of {samples} samples")
    estimates = [1 - math.comb(samples - c, k) / math.comb(samples, k) for c in correct]
    return mean_interval(estimates, samples)


def mean_interval(values: Sequence[float], samples: int = 1) -> Mean:
    """The mean of one number from 0 to 1 per problem, each from `samples` tries.

    Wilson's interval for as many yes-or-no problems as would scatter the mean equally (Franco, Little, Louis and Slud,
    J. Surv. Stat. Methodol. 7 (2019), 334-364), from n to one for each try. With one try it is `wilson`.
    Near 0 and 1 the normal and the bootstrap interval held the truth in as few as 3 % of simulated evaluations, this
    one in 73 % or more; elsewhere all three did in about 95 %.
    """
    if not values:
        raise ValueError("a mean needs at least one problem, got none")
    n, mean = len(values), min(1.0, fmean(values))
    scatter = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
    if mean in (0.0, 1.0):
        effective = float(n)  # nothing was seen to scatter, so nothing is known of it
    elif scatter == 0:
        effective = float(n * samples)
    else:
        effective = min(max(n, n * mean * (1 - mean) / scatter), n * samples)
    low, high = wilson(mean * effective, effective)
    return Mean(mean, low, high)


# --- sums and means of other figures ---


@dataclass(frozen=True)
class Ratio:
    """One sum over documents divided by another, and its interval: None for a single document."""

    value: float
    low: float | None
    high: float | None


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Ratio:
    """The sum of tops by the sum of bottoms, one of each per document, such as bits and bytes; bottoms above 0.

    The documents are taken for a random sample of those that could have been asked. How far the ratio moves when one
    of them is left out (the jackknife) gives the standard error, and Student's t the interval. In simulations it held
    the truth in 89 to 95 % of evaluations, least where few documents are most of the text; there the usual formula did
    in as few as 76 %.
    """
    n, whole = len(bottoms), sum(bottoms)
    if n != len(tops) or not n or min(bottoms) <= 0:
        raise ValueError(f"a ratio needs a top and a bottom above 0 of each document, got {len(tops)} and {n}")
    value = sum(tops) / whole
    if n == 1:
        return Ratio(value, None, None)
    moves = ((top - value * bottom) / (whole - bottom) for top, bottom in zip(tops, bottoms, strict=True))
    half = student(n - 1) * math.sqrt((n - 1) / n * sum(move**2 for move in moves))
    return Ratio(value, value - half, value + half)


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t: Abramowitz and Stegun 26.7.5, from 3 degrees of freedom on within 0.4 %."""
    if freedom <= 2:
        return (12.7062, 4.3027)[freedom - 1]
    z, v = Z, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def average(groups: Sequence[Sequence[Mean]]) -> Mean:
    """The mean of all figures of all groups, each with the same weight.

    Groups are independent. Figures of one group may hang together as they like (the same documents asked in two ways):
    they are taken to err together, which makes the interval no shorter than it should be.
    """
    count = sum(map(len, groups))
    if not count:
        raise ValueError("a mean needs at least one figure, got none")
    value = sum(each.value for group in groups for each in group) / count
    down = math.hypot(*(sum(each.value - each.low for each in group) for group in groups)) / count
    up = math.hypot(*(sum(each.high - each.value for each in group) for group in groups)) / count
    return Mean(value, value - down, value + up)


def apart(first: Mean, second: Mean) -> Mean:
    """First minus second, of different problems: nothing is paired."""
    value = first.value - second.value
    return Mean(
        value,
        value - math.hypot(first.value - first.low, second.high - second.value),
        value + math.hypot(first.high - first.value, second.value - second.low),
    )
