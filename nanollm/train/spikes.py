"""When is a loss so far above those before it that its update would do more harm than good?

Source: the skip-step optimizer of OLMo-core (github.com/allenai/OLMo-core, 6 standard deviations over 128 steps). There
an outlier enters the window as it is, so that after a few of them the next one passes; here it enters as the largest
loss that would have passed: what stays a little higher is soon normal again, what is a hundred times higher never is.
"""

from collections.abc import Sequence
from statistics import fmean, pstdev

SIGMAS = 6.0
"""As a rule."""
WINDOW = 128
"""Steps that a loss is compared with."""
FEWEST = 64
"""Steps before which nothing is an outlier."""


def highest_usual(losses: Sequence[float], sigmas: float) -> float:
    """The largest loss that is not an outlier after these; infinite while they are too few, or with 0 sigmas."""
    if not sigmas or len(losses) < FEWEST:
        return float("inf")
    return fmean(losses) + sigmas * pstdev(losses)


def remember(losses: Sequence[float], loss: float, highest: float) -> list[float]:
    """The window after one more finite loss."""
    return [*losses, min(loss, highest)][-WINDOW:]
