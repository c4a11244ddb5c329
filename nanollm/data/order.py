"""The order of the samples, without a list of them: which window or conversation, and of several sources which.

Sample j of step s is known from (seed, s, j) alone, so a resumed run needs the step number only. Within a source: a
keyed permutation of [0, n), a Feistel network over pairs of digits in base ceil(sqrt(n)), walked along its cycle until
the number is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

Among sources: the quota method (Balinski and Young, The American Mathematical Monthly 82 (1975), 701-730). The next
sample goes to the source that has waited longest, among those that would not run ahead of their share: after g samples
a source of share p has given g * p, rounded down or up. The shares are whole parts of a period.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

_ROUNDS = 8
PERIOD = 10_000  # parts at most, about: shares that need a finer division are rounded to it


def permute(index: npt.ArrayLike, n: int, seed: int) -> Indices:
    """Where each index of [0, n) goes in the permutation of that seed: any shape in, the same shape of int64 out."""
    number = np.array(index, dtype=np.int64)
    if n < 1 or ((number < 0) | (number >= n)).any():
        raise ValueError(f"every index must lie in [0, {n}), got {number.min()} to {number.max()}")
    side = math.isqrt(n - 1) + 1  # side**2 >= n, and so close to n that few numbers need a second walk
    digest = blake2b(f"round keys of {seed}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    flat = _encipher(number.ravel().astype(np.uint64), side, keys)
    while (outside := flat >= n).any():
        flat[outside] = _encipher(flat[outside], side, keys)
    return flat.astype(np.int64).reshape(number.shape)


def sample_indices(step: int, global_batch: int, n: int, seed: int) -> Indices:
    """The windows of one step in their global order, (global_batch,) int64, whatever the number of ranks.

    Sample g = step * global_batch + j belongs to epoch g // n; each epoch is a fresh permutation of all n windows.
    """
    samples = step * global_batch + np.arange(global_batch, dtype=np.int64)
    epochs, places = np.divmod(samples, n)
    windows = np.empty_like(samples)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(places[chosen], n, epoch_seed(seed, int(epoch)))
    return windows


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed for each pair of run seed and epoch."""
    return int.from_bytes(blake2b(f"epoch {epoch} of {seed}".encode(), digest_size=8).digest(), "little")


def _encipher(number: Uint64s, side: int, keys: Uint64s) -> Uint64s:
    """A permutation of [0, side**2): each round adds a keyed hash of the low digit to the high one and swaps them."""
    base = np.uint64(side)
    high, low = np.divmod(number, base)
    for key in keys:
        high, low = low, (high + mix(low, key) % base) % base
    return high * base + low


def mix(word: Uint64s, key: np.uint64 | Uint64s) -> Uint64s:
    """A keyed hash, (n,) to (n,): MurmurHash3's finalizer on 64 bits. Arrays of uint64 wrap around, as it wants."""
    word = (word ^ key) * np.uint64(0xFF51AFD7ED558CCD)
    word = (word ^ (word >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return word ^ (word >> np.uint64(33))


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
