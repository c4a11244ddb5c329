"""The pictures of the report are true to their numbers."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanollm.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    Series,
    heat_map,
    line_chart,
    log_ticks,
    short,
    thinned,
    ticks,
)

UNHURRIED = settings(deadline=None, suppress_health_check=list(HealthCheck))  # the machine may be busy
NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)
TAG = "{http://www.w3.org/2000/svg}"


def points_of(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.-]+ [\d.-]+", path)]


@UNHURRIED
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=50), st.booleans(), st.booleans())
def test_every_point_of_every_line_lies_within_its_axes(points, log, smooth):
    points.sort()
    series = Series(name="loss", xs=[x for x, _ in points], ys=[y for _, y in points])
    svg = ElementTree.fromstring(line_chart("Loss", "nats", [series], x_unit="steps", log=log, smooth=smooth))
    lines = [each for each in svg.iter(f"{TAG}path") if "line" in each.get("class").split()]
    assert len(lines) == 1
    for x, y in points_of(lines[0].get("d")):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_a_line_goes_where_its_numbers_are():
    svg = ElementTree.fromstring(
        line_chart("Loss", "nats", [Series(name="run", xs=[0, 5, 10], ys=[1.0, 3.0, 2.0])], x_unit="steps")
    )
    (line,) = [each for each in svg.iter(f"{TAG}path") if "line" in each.get("class").split()]
    middle = ((LEFT + WIDTH - RIGHT) / 2, TOP), (WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2)
    assert points_of(line.get("d")) == [(LEFT, HEIGHT - BOTTOM), *middle]


def test_a_logarithmic_axis_puts_the_geometric_mean_in_the_middle_and_gives_way_to_zeros():
    assert Scale(1, 100, 0, 10, log=True).place(10) == pytest.approx(5)
    svg = line_chart("Loss", "nats", [Series(name="run", xs=[0, 1], ys=[0.0, 1.0])], x_unit="steps", log=True)
    assert "nan" not in svg and "inf" not in svg


@UNHURRIED
@given(NUMBERS, NUMBERS)
def test_ticks_are_few_round_and_within_the_axis(one, other):
    low, high = sorted((one, other))
    found = ticks(low, high)
    if low == high or not math.isfinite(1 / (high - low)):
        return
    assert 1 <= len(found) <= 8
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in found)


@UNHURRIED
@given(st.floats(1e-12, 1e12), st.floats(1, 1e9))
def test_ticks_of_a_logarithmic_axis_are_few_and_within_it(low, times):
    found = log_ticks(low, low * times)
    assert len(found) <= 9
    assert all(low * (1 - 1e-6) <= tick <= low * times * (1 + 1e-6) for tick in found)
    assert times < 2.5 or found


@UNHURRIED
@given(st.lists(NUMBERS, min_size=1, max_size=1000))
def test_a_thinned_line_is_short_ends_where_the_line_ends_and_never_leaves_its_range(ys):
    line = thinned(Series(name="run", xs=list(range(len(ys))), ys=ys), most=100)
    assert len(line.xs) == len(line.ys) <= 101
    assert (line.xs[-1], line.ys[-1]) == (len(ys) - 1, ys[-1])
    assert min(ys) - 1e-3 <= min(line.ys) and max(line.ys) <= max(ys) + 1e-3


def test_a_cell_is_as_dark_as_its_value():
    values = [[0.0, 0.25, 2.0]]
    svg = ElementTree.fromstring(heat_map("Share", ["block 4 · 1"], [10, 20, 30], values, "steps", full=0.5))
    cells = [each for each in svg.iter(f"{TAG}rect") if each.get("class") == "cell"]
    assert [float(cell.get("fill-opacity")) for cell in cells] == [0.0, 0.5, 1.0]
    assert cells[1].find(f"{TAG}title").text == "block 4 · 1, steps 20: 25%"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (0.0031, "0.0031"),
        (2e-5, "2.0e-05"),
        (1500, "1,500"),
        (2.4e6, "2.4 M"),
        (-3e9, "-3 G"),
    ],
)
def test_numbers_are_written_as_people_read_them(value, text):
    assert short(value) == text
