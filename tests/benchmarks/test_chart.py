"""The charts of benchmarks: every point is where its value belongs, and the file is XML."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import chart

SVG = "{http://www.w3.org/2000/svg}"
values = st.floats(0.01, 1e6)
points = st.lists(st.tuples(st.integers(1, 4096), values), min_size=1, max_size=8)


@given(points, st.booleans())
def test_places_follow_values(pairs: list[tuple[int, float]], roofed: bool) -> None:
    made = [chart.Point(x, y, y / 2, y * 2, y * 3 if roofed else None) for x, y in pairs]
    panel = chart.Panel("a < b", "x", "y & z", [chart.Series('"one"', made)])
    root = ElementTree.fromstring(chart.draw([panel, panel, panel], note="<note>"))
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == 3 * len(pairs)
    across = [float(circle.attrib["cx"]) for circle in circles[: len(pairs)]]
    down = [float(circle.attrib["cy"]) for circle in circles[: len(pairs)]]
    assert all(0 <= place <= chart.PANEL_WIDTH for place in across)
    assert all(0 <= place <= chart.PANEL_HEIGHT for place in down)
    for (x, y), place, height in zip(pairs, across, down, strict=True):
        for (other_x, other_y), other, other_height in zip(pairs, across, down, strict=True):
            assert (place - other) * (x - other_x) >= 0
            assert (height - other_height) * (y - other_y) <= 0
    roofs = [path for path in root.iter(f"{SVG}path") if path.attrib["class"] == "roof"]
    assert len(roofs) == (3 if roofed else 0)


def test_the_limit_stands_where_the_measured_would() -> None:
    """Steps of the same ratio are of the same length, and a roof at a value is at its height."""
    made = [chart.Point(x, 10.0 * x, 10.0 * x, 10.0 * x, 20.0 * x) for x in (1, 2, 4)]
    text = chart.draw([chart.Panel("t", "x", "y", [chart.Series("s", made)])])
    heights = [float(one) for one in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', text)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    (roof,) = re.findall(r'class="roof"[^>]* d="M([^"]+)"', text)
    places = [tuple(map(float, pair.split())) for pair in roof.split("L")]
    assert [down for _, down in places[:2]] == heights[1:]


def test_ticks_are_round_numbers() -> None:
    ticks = list(chart._ticks(3.0, 700.0))
    assert ticks == [5, 10, 20, 50, 100, 200, 500]
    assert all(math.log10(tick) < 3 for tick in ticks)
