"""In which order are the windows of a corpus seen, without keeping a list of them?

A keyed permutation of [0, n): a Feistel network over pairs of digits in base ceil(sqrt(n)), walked along its cycle
until the number is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Nothing is
stored: sample j of step s is known from (seed, s, j) alone, so that a resumed run needs the step number only.
"""

import math
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_ROUNDS = 8


def permute(index: npt.ArrayLike, n: int, seed: int) -> Indices:
    """Where each index of [0, n) goes in the permutation of that seed: any shape in, the same shape of int64 out."""
    number = np.array(index, dtype=np.int64)
    if n < 1 or ((number < 0) | (number >= n)).any():
        raise ValueError(f"every index must lie in [0, {n}), got {number.min()} to {number.max()}")
    side = math.isqrt(n - 1) + 1  # side**2 >= n, and so close to n that few numbers need a second walk
    keys = _round_keys(seed)
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


def _round_keys(seed: int) -> Words:
    digest = blake2b(f"round keys of {seed}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _encipher(number: Words, side: int, keys: Words) -> Words:
    """A permutation of [0, side**2): each round adds a keyed hash of the low digit to the high one and swaps them."""
    base = np.uint64(side)
    high, low = np.divmod(number, base)
    for key in keys:
        high, low = low, (high + mix(low, key) % base) % base
    return high * base + low


def mix(word: Words, key: np.uint64 | Words) -> Words:
    """A keyed hash, (n,) to (n,): MurmurHash3's finalizer on 64 bits. Arrays of uint64 wrap around, as it wants."""
    word = (word ^ key) * np.uint64(0xFF51AFD7ED558CCD)
    word = (word ^ (word >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return word ^ (word >> np.uint64(33))
