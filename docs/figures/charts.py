"""How do measured numbers become panels with axes, curves, bars and cells?

Several panels share a picture, which the charts of the report page do not; scales, ticks and the way numbers are
written are theirs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from docs.figures.picture import GROUND, SERIES, Picture
from nanollm.report.charts import Scale, short, ticks

DASHES = ("", " dashed", " dotted", "", " dashed")  # series differ without their colours, too
CHARACTER = 6.6  # width of one in the widest font, in pixels


@dataclass(frozen=True)
class Panel:
    """A frame with two axes, on which curves are drawn; the title stands above, then the unit of y."""

    picture: Picture
    x: Scale
    y: Scale

    @classmethod
    def draw(
        cls,
        picture: Picture,
        place: tuple[float, float, float, float],
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        title: str,
        x_unit: str,
        y_unit: str,
        x_names: Sequence[str] = (),
        log: bool = False,
        most: int = 5,
    ) -> "Panel":
        """Draw the frame at left, top, width, height. x_names: words at 0, 1, 2, ... instead of numbers."""
        left, top, width, height = place
        scales = Scale(*x, left, left + width), Scale(*y, top + height, top, log)
        picture.text(left - 34, top - 37, title, "ink strong", "start")
        picture.text(left - 34, top - 19, y_unit, "soft", "start")
        for tick in _decades(*y) if log else ticks(*y, most):
            at = scales[1].place(tick)
            picture.line((left, at), (left + width, at), style="grid")
            picture.text(left - 7, at, short(tick), "soft", "end")
        for at, name in list(enumerate(x_names)) or [(tick, short(tick)) for tick in ticks(*x, most)]:
            picture.text(scales[0].place(at), top + height + 14, name, "soft")
        picture.text(left + width / 2, top + height + 33, x_unit, "soft")
        picture.line((left, top + height), (left + width, top + height))
        return cls(picture, *scales)

    def curve(self, xs: Sequence[float], ys: Sequence[float], series: int, *, thin: bool = False) -> None:
        style = f"curve curve{series}" + (" thin" if thin else DASHES[series])
        self.picture.line(*self._places(xs, ys), style=style)

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], series: int) -> None:
        around = [*self._places(xs, highs), *reversed(self._places(xs, lows))]
        self.picture.area(*around, style=f"band fill{series}")

    def dots(self, xs: Sequence[float], ys: Sequence[float], series: int, radius: float = 3.5) -> None:
        for x, y in self._places(xs, ys):
            self.picture.dot(x, y, f"fill{series}", radius)

    def whisker(self, x: float, low: float, high: float, series: int) -> None:
        """An interval, upright."""
        self.picture.line(*self._places((x, x), (low, high)), style=f"curve curve{series}")

    def level(self, y: float) -> None:
        """A dotted line across at a value that others are held against."""
        at = self.y.place(y)
        self.picture.line((self.x.start, at), (self.x.end, at), style="line dotted")

    def _places(self, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
        return [(self.x.place(x), self.y.place(y)) for x, y in zip(xs, ys, strict=True)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten."""
    found = (times * 10.0**power for power in range(-6, 9) for times in (1, 2, 5))
    return [tick for tick in found if low <= tick <= high]


def up_to(values: Sequence[float], most: int = 5) -> tuple[float, float]:
    """From 0 to the first tick that none of the values exceeds."""
    step = ticks(0, max(values) or 1, most)[1]
    return 0.0, step * math.ceil(max(values) / step - 1e-9)


def legend(picture: Picture, x: float, y: float, names: Sequence[str], *, swatch: bool = False) -> None:
    """The series by name, from left to right; swatch: as filled squares, not as lines."""
    for series, name in enumerate(names):
        if swatch:
            picture.rect(x, y - 6, 12, 12, f"fill{series}", round_by=2)
        else:
            picture.line((x, y), (x + 22, y), style=f"curve curve{series}{DASHES[series]}")
        start = x + (18 if swatch else 28)
        picture.text(start, y, name, "ink", "start")
        x = start + CHARACTER * len(name) + 18


def heat_map(
    picture: Picture,
    place: tuple[float, float, float, float],
    values: Sequence[Sequence[float]],
    *,
    series: int = 0,
    other: int | None = None,
    tell: Callable[[float], str] | None = None,
) -> None:
    """Cells whose colour tells values from 0 to 1, at left and top, each of a width and a height.

    other: this series for values below one half, and none at one half. tell: the words in a cell.
    """
    left, top, width, height = place
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            shown = value if other is None else abs(2 * value - 1)
            colour = series if other is None or value >= 0.5 else other
            x, y = left + column * width, top + row * height
            if shown >= 0.005:
                picture.rect(x, y, width - 1, height - 1, f"fill{colour}", opacity=min(1.0, shown))
            if tell is not None:
                picture.text(x + (width - 1) / 2, y + (height - 1) / 2, tell(value), ink_on(colour, shown) + " small")


def ink_on(series: int, opacity: float) -> str:
    """The class of black or white words, whichever differs more from this colour laid on the ground, in each scheme."""
    choices = []
    for scheme in (0, 1):
        top, ground = (channels(pair[scheme]) for pair in (SERIES[series], GROUND))
        mixed = [a * opacity + b * (1 - opacity) for a, b in zip(top, ground, strict=True)]
        choices.append(int(luminance(mixed) < 0.179))  # there black and white differ from it alike
    return f"on{choices[0]}{choices[1]}"


def channels(colour: str) -> list[float]:
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def luminance(channels: Sequence[float]) -> float:
    """Relative luminance of red, green and blue from 0 to 1 (WCAG 2.2)."""
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
