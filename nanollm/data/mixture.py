"""Which of several sources does each sample come from, so that all keep their share all the time?

The quota method (Balinski and Young, The American Mathematical Monthly 82 (1975), 701-730): the next sample goes to
the source that has waited longest, among those that would not run ahead of their share. After g samples a source of
share p has given g * p, rounded down or up. The shares are whole parts of a period, so nothing is scanned or stored
between steps.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from nanollm.data.order import Indices

PERIOD = 10_000
"""Parts at most, about: shares that need a finer division are rounded to it."""


class Mixture:
    """An endless row of sources 0, 1, ... in the proportion of their weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.parts = parts_of(weights)
        self._sources = np.array(interleave(self.parts))  # (period,)
        is_source = self._sources[:, None] == np.arange(len(self.parts))  # (period, sources)
        earlier = is_source.cumsum(0) - is_source
        self._earlier = earlier[np.arange(len(earlier)), self._sources]  # (period,) draws of the same source before

    def draws(self, first: int, count: int) -> tuple[Indices, Indices]:
        """For samples first, first + 1, ...: the source of each, and how often that source was drawn before.

        Both (count,) int64.
        """
        periods, places = np.divmod(np.arange(first, first + count), len(self._sources))
        sources = self._sources[places]
        return sources, periods * np.array(self.parts)[sources] + self._earlier[places]


def parts_of(weights: Sequence[float]) -> list[int]:
    """Weights as whole parts: 0.7 and 0.3 are 7 and 3. ValueError for a weight that is not above 0."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a weight of a mixture must be above 0, got {weight}; leave out what is not to be read")
    fractions = [Fraction(str(weight)) for weight in weights]
    whole = [fraction * math.lcm(*(each.denominator for each in fractions)) for fraction in fractions]
    parts = [int(number) // math.gcd(*map(int, whole)) for number in whole]
    if (total := sum(parts)) <= PERIOD:
        return parts
    return [max(1, round(PERIOD * part / total)) for part in parts]


def interleave(parts: Sequence[int]) -> list[int]:
    """One period: source s comes parts[s] times."""
    total, given = sum(parts), [0] * len(parts)
    order = []
    for place in range(1, total + 1):
        may = (source for source, part in enumerate(parts) if given[source] * total < place * part)
        chosen = min(may, key=lambda source: (given[source] + 1) / parts[source])
        given[chosen] += 1
        order.append(chosen)
    return order
