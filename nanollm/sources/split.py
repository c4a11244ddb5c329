"""Splitting a source into train and val: by the hash of a text, or at the end of a single text."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from hashlib import blake2b

from nanollm.sources.files import OnBad

BORDERS = "\n\n", "\n", " "  # the best place to cut first

Pieces = Callable[[OnBad], Iterable[str]]


def hash_to_unit(text: str, key: str) -> float:
    """A number in [0, 1): always the same for one text and key, unrelated for another text or another key."""
    digest = blake2b(text.encode(), digest_size=8, key=key.encode()[:64]).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # as many bits as a float holds: never rounded up to 1


def hold_out(pieces: Pieces, share: float) -> tuple[Pieces, Pieces]:
    """The beginning of a text and its end, which has about `share` of the characters; joined they are the text.

    The text is read piece by piece, once more to count it. Bad records are told with the beginning.
    """

    @cache
    def begin() -> int:
        """Where the end begins at the latest, in characters; at the earliest half its length before."""
        return round((1 - share) * sum(len(piece) for piece in pieces(_keep_silent)))

    def halves(on_bad: OnBad) -> Iterator[tuple[str, str]]:
        latest = begin()
        reach = round(latest * share / (1 - share) / 2)
        for piece in pieces(on_bad):
            cut = border(piece, latest, reach)
            yield piece[:cut], piece[cut:]
            latest -= len(piece)

    return (
        lambda on_bad: (first for first, _ in halves(on_bad) if first.strip()),
        lambda on_bad: (second for _, second in halves(_keep_silent) if second.strip()),
    )


def border(text: str, latest: int, reach: int) -> int:
    """Where to cut: behind a blank line, a line or a word that ends within `reach` before `latest`, else there."""
    if not 0 < latest < len(text):
        return min(max(latest, 0), len(text))
    ends = ((text.rfind(mark, max(0, latest - reach), latest), mark) for mark in BORDERS)
    return next((at + len(mark) for at, mark in ends if at >= 0), latest)


def _keep_silent(record: object) -> None:
    """The other half tells of bad records."""
