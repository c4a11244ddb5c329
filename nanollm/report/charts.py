"""Charts as inline SVG.

Colours are classes (`s0`, `s1`, ...; `ink`, `grid`), so that the page around it decides what they are in
the light, in the dark and on paper. Series differ in their dashes, too, for readers who see no difference in colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

MAX_POINTS = 400  # of a line; more cannot be told apart in this width
SMOOTHED_FROM = 40  # points from which a noisy line gets a smooth one on top of it
LOOKS = 8  # classes s0 to s7 and d0 to d7
WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: points in the order of x, and perhaps the interval of each."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    look: int = 0
    """Which colour and dashes."""
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()


@dataclass(frozen=True)
class Scale:
    """Numbers of one axis to places on the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1)


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    x_unit: str,
    log: bool = False,
    smooth: bool = False,
    least: float | None = None,
) -> str:
    """Lines over one x axis.

    `log` makes y logarithmic where all values are above 0; `smooth` draws noise thinly and its mean on top of it;
    `least` is where y begins, if that is not the lowest value.
    """
    log = log and all_positive(series)
    x_scale, y_scale = _scales(series, log, least)
    svg = _canvas(WIDTH, HEIGHT, f"{title} in {unit} over {x_unit}: " + "; ".join(map(_told, series)))
    for tick in (log_ticks if log else ticks)(y_scale.low, y_scale.high):
        y = y_scale.place(tick)
        SubElement(svg, "path", {"class": "grid", "d": f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}"})
        _text(svg, LEFT - 8, y + 4, short(tick), "end")
    for tick in ticks(x_scale.low, x_scale.high):
        x = x_scale.place(tick)
        SubElement(svg, "path", {"class": "grid", "d": f"M{x:.1f} {HEIGHT - BOTTOM}v5"})
        _text(svg, x, HEIGHT - BOTTOM + 19, short(tick), "middle")
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_unit, "middle")
    for each in series:
        _draw(svg, each, each.look % LOOKS, x_scale, y_scale, smooth)
    return ElementTree.tostring(svg, encoding="unicode")


def all_positive(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis can show them."""
    return all(y > 0 for each in series for y in (*each.ys, *each.lows))


def heat_map(
    title: str, rows: Sequence[str], xs: Sequence[float], values: Sequence[Sequence[float]], x_unit: str, full: float
) -> str:
    """Rows of cells, values (rows, columns) from 0, which is empty; one of `full` or more is as dark as can be."""
    height = TOP + 18 * len(rows) + BOTTOM
    svg = _canvas(WIDTH, height, f"{title} over {x_unit}; rows: {', '.join(rows)}")
    left, width = LEFT + 56, (WIDTH - RIGHT - LEFT - 56) / max(1, len(xs))
    for number, (row, cells) in enumerate(zip(rows, values, strict=True)):
        y = TOP + 18 * number
        _text(svg, left - 8, y + 12, row, "end")
        for column, value in enumerate(cells):
            place = {"x": f"{left + column * width:.1f}", "y": str(y), "width": f"{width + 0.3:.1f}", "height": "16"}
            cell = SubElement(svg, "rect", {"class": "cell", "fill-opacity": f"{min(1.0, value / full):.2f}", **place})
            SubElement(cell, "title", {}).text = f"{row}, {x_unit} {short(xs[column])}: {value:.0%}"
    scale = Scale(0, max(1, len(xs) - 1), left + width / 2, WIDTH - RIGHT - width / 2)
    for column in dict.fromkeys(round(share * (len(xs) - 1)) for share in (0, 0.25, 0.5, 0.75, 1)):
        _text(svg, scale.place(column), height - BOTTOM + 19, short(xs[column]), "middle")
    _text(svg, (left + WIDTH - RIGHT) / 2, height - 6, x_unit, "middle")
    return ElementTree.tostring(svg, encoding="unicode")


# --- numbers ---


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two ends, a step of 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers for a logarithmic axis, both ends above 0: powers of ten where it spans several of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        return [10.0**power for power in range(first, last + 1, -(-(last - first + 1) // most))]
    if high / low < 10:
        return ticks(low, high, most)
    ladder = [times * 10.0**power for power in range(first - 1, last + 1) for times in (1, 2, 5)]
    return [tick for tick in ladder if low <= tick <= high]


def short(value: float) -> str:
    """A number as people read it on an axis: 1,500 or 2.4 M or 0.0031."""
    size = abs(value)
    for unit, scale in (("G", 1e9), ("M", 1e6)):
        if size >= scale:
            return f"{value / scale:.4g} {unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 or value == 0 else f"{value:.1e}"


def thinned(series: Series, most: int = MAX_POINTS) -> Series:
    """The same line with fewer points, each the mean of its neighbours; the last one stays as it is."""
    size = -(-len(series.xs) // most)
    if size <= 1:
        return series
    parts = [slice(start, start + size) for start in range(0, len(series.xs) - 1, size)]

    def means(values: Sequence[float]) -> list[float]:
        return [*(fmean(values[:-1][part]) for part in parts), values[-1]] if values else []

    return replace(series, xs=means(series.xs), ys=means(series.ys), lows=means(series.lows), highs=means(series.highs))


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean of the `width` values around each."""
    half = width // 2
    return [fmean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]


# --- shapes ---


def _scales(series: Sequence[Series], log: bool, least: float | None) -> tuple[Scale, Scale]:
    xs = [x for each in series for x in each.xs]
    ys = [y for each in series for y in (*each.ys, *each.lows, *each.highs)]
    low, high = min(ys) if least is None else least, max(ys)
    if low == high:  # a flat line lies in the middle
        low, high = (low / 1.1, high * 1.1) if log else (low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10)
    return (
        Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT),
        Scale(low, high, HEIGHT - BOTTOM, TOP, log),
    )


def _draw(svg: Element, series: Series, colour: int, x_scale: Scale, y_scale: Scale, smooth: bool) -> None:
    line = thinned(series)
    xs = [x_scale.place(x) for x in line.xs]

    def places(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(x, y_scale.place(y)) for x, y in zip(xs, values, strict=True)]

    if line.lows:
        band = _path([*places(line.highs), *reversed(places(line.lows))])
        SubElement(svg, "path", {"class": f"s{colour} band", "d": f"{band}Z"})
    is_noisy = smooth and len(xs) >= SMOOTHED_FROM
    if is_noisy:
        SubElement(svg, "path", {"class": f"s{colour} noise", "d": _path(places(line.ys))})
    ys = smoothed(line.ys, max(3, len(xs) // 25)) if is_noisy else line.ys
    path = SubElement(svg, "path", {"class": f"s{colour} line d{colour}", "d": _path(places(ys))})
    SubElement(path, "title", {}).text = _told(series)
    if len(xs) < SMOOTHED_FROM:
        for x, y in places(line.ys):
            SubElement(svg, "circle", {"class": f"s{colour} point", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.5"})


def _told(series: Series) -> str:
    """A line in words, for who does not see it."""
    return f"{series.name} from {short(series.ys[0])} to {short(series.ys[-1])}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _canvas(width: int, height: int, label: str) -> Element:
    box = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label}
    return Element("svg", {"xmlns": SVG, **box})


def _text(svg: Element, x: float, y: float, words: str, anchor: str) -> None:
    SubElement(svg, "text", {"class": "ink", "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}).text = words


def key(look: int) -> str:
    """A piece of a line, to stand beside its name."""
    svg = Element("svg", {"xmlns": SVG, "viewBox": "0 0 28 10", "class": "key", "aria-hidden": "true"})
    SubElement(svg, "path", {"class": f"s{look % LOOKS} line d{look % LOOKS}", "d": "M1 5H27"})
    return ElementTree.tostring(svg, encoding="unicode")
