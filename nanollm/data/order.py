"""The order of the samples, without a list of them: which window or conversation, and of several sources which.

Sample j of step s is known from (seed, s, j) alone, so a resumed run needs the step number only. Within a source: a
keyed permutation of [0, n), a Feistel network over pairs of digits in base ceil(sqrt(n)), walked along its cycle until
the number is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

Among sources: the quota method (Balinski and Young, The American Mathematical Monthly 82 (1975), 701-730). The next
sample goes to the source that has waited longest, among those that would not run ahead of their share: after g samples
a source of share p has given g * p, rounded down or up. The shares are whole parts of a period. A later mixture may
take over at some sample; every source then goes on where it was.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path

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
    return mixed_indices(step, global_batch, [n], Mixture([1]), seed)[1]


def mixed_indices(
    step: int, global_batch: int, sizes: Sequence[int], mixture: "Mixture", seed: int
) -> tuple[Indices, Indices]:
    """The same of several sources of these sizes: the source of each sample and its number there, both (global_batch,).

    Draw d of a source belongs to epoch d // n of its n samples; each epoch is a fresh permutation of all n.
    """
    sources, draws = mixture.draws(step * global_batch, global_batch)
    epochs, places = np.divmod(draws, np.array(sizes)[sources])
    numbers = np.empty_like(draws)
    for source, epoch in {*zip(sources.tolist(), epochs.tolist(), strict=True)}:
        chosen = (sources == source) & (epochs == epoch)
        of_source = seed + (source << 32)  # each source in an order of its own
        numbers[chosen] = permute(places[chosen], sizes[source], epoch_seed(of_source, epoch))
    return sources, numbers


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
    """An endless row of sources 0, 1, ... in the proportion of their weights, perhaps after another mixture of them."""

    def __init__(self, weights: Sequence[float], *, after: "Mixture | None" = None, begins: int = 0) -> None:
        """after: the mixture that holds before sample `begins`."""
        self.parts, self._after, self._begins = parts_of(weights), after, begins
        self._sources = np.array(interleave(self.parts))  # (period,)
        is_source = self._sources[:, None] == np.arange(len(self.parts))  # (period, sources)
        earlier = is_source.cumsum(0) - is_source
        self._earlier = earlier[np.arange(len(earlier)), self._sources]  # (period,) draws of the same source before
        self._drawn_before = after.drawn(begins) if after else np.zeros(len(self.parts), dtype=np.int64)

    def draws(self, first: int, count: int) -> tuple[Indices, Indices]:
        """For samples first, first + 1, ...: the source of each, and how often that source was drawn before.

        Both (count,) int64. All of them must lie in one mixture.
        """
        if self._after and first < self._begins:
            assert first + count <= self._begins
            return self._after.draws(first, count)
        periods, places = np.divmod(np.arange(first, first + count) - self._begins, len(self._sources))
        sources = self._sources[places]
        within = periods * np.array(self.parts)[sources] + self._earlier[places]
        return sources, self._drawn_before[sources] + within

    def drawn(self, count: int) -> Indices:
        """How many of the first samples come from each source, (sources,) int64."""
        if self._after and count < self._begins:
            return self._after.drawn(count)
        periods, rest = divmod(count - self._begins, len(self._sources))
        of_rest = np.bincount(self._sources[:rest], minlength=len(self.parts))
        return self._drawn_before + periods * np.array(self.parts) + of_rest


def parts_of(weights: Sequence[float]) -> list[int]:
    """Weights as whole parts: 0.7 and 0.3 are 7 and 3. ValueError for one below 0, or if none is above."""
    if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
        raise ValueError(f"the weights of a mixture must be 0 or more, and one above 0, got {[*weights]}")
    fractions = [Fraction(str(weight)) for weight in weights]
    whole = [fraction * math.lcm(*(each.denominator for each in fractions)) for fraction in fractions]
    parts = [int(number) // math.gcd(*map(int, whole)) for number in whole]
    if (total := sum(parts)) <= PERIOD:
        return parts
    return [part and max(1, round(PERIOD * part / total)) for part in parts]


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


def sources_of(given: dict[str, float] | Path, option: str = "data") -> dict[str, float]:
    """One folder, or several with weights, as folder to weight; sorted, so that no order of writing changes a run."""
    if not isinstance(given, dict):
        if str(given).startswith("{"):  # what was meant as a mapping and is none reads as a path
            raise ValueError(f"{option}: expected a folder or {{folder: weight, ...}}, got {given}")
        given = {str(given): 1.0}
    weights = {Path(folder).as_posix(): float(weight) for folder, weight in sorted(given.items())}
    if not weights or len(weights) < len(given):
        raise ValueError(f"{option} must name at least one folder, and each once, got {', '.join(given) or 'none'}")
    for folder, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"{option}: the weight of {folder} must be above 0, got {weight}; leave the folder out instead"
            )
    return weights
