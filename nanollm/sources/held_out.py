"""Holding out the end of one text: nothing of it is trained on, and a model is measured there."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

from nanollm.sources.files import OnBad

BORDERS = "\n\n", "\n", " "  # the best place to cut first

Pieces = Callable[[OnBad], Iterable[str]]


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
