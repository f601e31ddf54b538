"""Line charts on logarithmic axes as SVG, light or dark as the reader's system is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

PANEL_WIDTH, PANEL_HEIGHT = 380, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 56, 34, 16, 42
_LABEL_WIDTH = 26
_LEGEND_ROW = 18
_HUES = ("#3b6fd4", "#d9731a", "#2f9e62", "#8a4fd0", "#1796a5", "#c2410c", "#64748b")
_STYLE = """\
svg { color-scheme: light dark; font-family: system-ui, "DejaVu Sans", sans-serif;
  --paper: light-dark(#ffffff, #12151c); --ink: light-dark(#1d2330, #e7eaf1);
  --soft: light-dark(#606879, #98a1b3); --line: light-dark(#e2e5ec, #2c3340); }
.ground { fill: #ffffff; fill: var(--paper); }
text { fill: #606879; fill: var(--soft); font-size: 11px; }
.title { fill: #1d2330; fill: var(--ink); font-size: 13px; font-weight: 650; }
.grid { stroke: #e2e5ec; stroke: var(--line); } .axis { stroke: #606879; stroke: var(--soft); }
.line, .roof { fill: none; stroke-width: 2; } .roof { stroke-width: 1.5; stroke-dasharray: 4 4; }
.reach { stroke-width: 1.2; opacity: 0.7; }
"""


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured at one place: the median, the least, the greatest, and the limit there."""

    x: float
    y: float
    low: float
    high: float
    roof: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """One line, with a name for the legend; the limit is drawn dashed in its colour."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; values are positive, and both axes logarithmic, to base 2 and 10."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


def draw(panels: Sequence[Panel], columns: int = 2, note: str = "") -> str:
    """The panels in rows, as an SVG file of its own; `note` stands below them."""
    names = list(dict.fromkeys(one.name for panel in panels for one in panel.series))
    hues = {name: _HUES[at % len(_HUES)] for at, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    most = max(len(panel.series) for panel in panels)
    height = PANEL_HEIGHT + _LEGEND_ROW * -(-most // 3)
    whole = (columns * PANEL_WIDTH, rows * height + (24 if note else 0))
    body = []
    for at, panel in enumerate(panels):
        x, y = at % columns * PANEL_WIDTH, at // columns * height
        body.append(f'<g transform="translate({x} {y})">')
        body.extend(_panel(panel, hues))
        body.append("</g>")
    if note:
        body.append(f'<text x="{_LEFT}" y="{whole[1] - 8}">{escape(note)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole[0]} {whole[1]}"'
    head += f' width="{whole[0]}" height="{whole[1]}" role="img">'
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", ground, *body, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class _Scale:
    """A logarithmic scale between two values, and where in the panel it lies."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.stop - self.start), 1)


def _panel(panel: Panel, hues: dict[str, str]) -> Iterator[str]:
    points = [point for one in panel.series for point in one.points]
    xs = [point.x for point in points]
    ys = [v for p in points for v in (p.low, p.high, p.roof) if v is not None]
    x = _Scale(min(xs) / 1.15, max(xs) * 1.15, _LEFT, PANEL_WIDTH - _RIGHT)
    y = _Scale(min(ys) / 1.2, max(ys) * 1.2, PANEL_HEIGHT - _BOTTOM, _TOP)
    yield f'<text class="title" x="{_LEFT}" y="20">{escape(panel.title)}</text>'
    yield from _axes(panel, x, y, sorted(set(xs)))
    for at, one in enumerate(panel.series):
        yield from _series(one, hues[one.name], x, y)
        left, top = _LEFT + at % 3 * 105, PANEL_HEIGHT + 6 + at // 3 * _LEGEND_ROW
        stroke = f'stroke="{hues[one.name]}"'
        yield f'<path class="line" {stroke} d="M{left} {top - 4}h16"/>'
        yield f'<text x="{left + 20}" y="{top}">{escape(one.name)}</text>'


def _axes(panel: Panel, x: _Scale, y: _Scale, xs: Sequence[float]) -> Iterator[str]:
    for value in _ticks(y.low, y.high):
        place = y.at(value)
        yield f'<path class="grid" d="M{x.start} {place}H{x.stop}"/>'
        yield f'<text x="{x.start - 6}" y="{place + 4}" text-anchor="end">{value:g}</text>'
    last = -math.inf
    for value in xs:
        place = x.at(value)
        yield f'<path class="grid" d="M{place} {y.start}V{y.stop}"/>'
        if place - last < _LABEL_WIDTH:
            continue
        last = place
        label = f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
        yield f'<text x="{place}" y="{y.start + 15}" text-anchor="middle">{label}</text>'
    yield f'<path class="axis" d="M{x.start} {y.start}H{x.stop}"/>'
    below = f'x="{(x.start + x.stop) / 2}" y="{y.start + 31}" text-anchor="middle"'
    yield f"<text {below}>{escape(panel.x_label)}</text>"
    yield f'<text x="6" y="{_TOP - 4}" font-style="italic">{escape(panel.y_label)}</text>'


def _ticks(low: float, high: float) -> Iterator[float]:
    """1, 2 and 5 times each power of ten between two values."""
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (v for v in (10.0**power * m for m in (1, 2, 5)) if low <= v <= high)


def _series(one: Series, hue: str, x: _Scale, y: _Scale) -> Iterator[str]:
    stroke = f'stroke="{hue}"'
    roofs = [(x.at(p.x), y.at(p.roof)) for p in one.points if p.roof is not None]
    if roofs:
        yield f'<path class="roof" {stroke} d="{_path(roofs)}"/>'
    yield f'<path class="line" {stroke} d="{_path([(x.at(p.x), y.at(p.y)) for p in one.points])}"/>'
    for point in one.points:
        across = x.at(point.x)
        yield f'<path class="reach" {stroke} d="M{across} {y.at(point.low)}V{y.at(point.high)}"/>'
        yield f'<circle cx="{across}" cy="{y.at(point.y)}" r="3" fill="{hue}"/>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{across} {down}" for across, down in places)
