"""A comparison of two executors as an SVG file, light or dark as the reader's system is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Final

from ...ir.errors import UsageError
from ..explain.amounts import format_bytes, printable
from .report import Parity, Side

_WIDTH, _HEIGHT, _GAP = 380, 250, 20
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 34, 14, 40
_LONGEST: Final = 100
"""Characters of a line over both columns."""
_HUES: Final = ("#3b6fd4", "#d9731a")
_LEAST: Final = 1e-9
"""Errors below it, and none at all, are drawn at the bottom."""
_STYLE: Final = """\
svg { color-scheme: light dark; font-family: system-ui, "DejaVu Sans", sans-serif;
  --paper: light-dark(#ffffff, #12151c); --ink: light-dark(#1d2330, #e7eaf1);
  --soft: light-dark(#606879, #98a1b3); --line: light-dark(#e2e5ec, #2c3340); }
.ground { fill: #ffffff; fill: var(--paper); }
text { fill: #606879; fill: var(--soft); font-size: 11px; }
.title { fill: #1d2330; fill: var(--ink); font-size: 13px; font-weight: 650; }
.grid { stroke: #e2e5ec; stroke: var(--line); } .axis { stroke: #606879; stroke: var(--soft); }
.line { fill: none; stroke-width: 2; } .amount { font-size: 10px; }
"""


def write_picture(parity: Parity, path: str | os.PathLike[str]) -> Path:
    """Writes `path`, and returns it; UsageError if it does not end in .svg or can't be written."""
    target = picture_path(path)
    try:
        target.write_text(draw(parity), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(target)) from None
    return target


def picture_path(path: str | os.PathLike[str]) -> Path:
    """A path for a picture; UsageError if it does not end in .svg."""
    target = Path(path)
    if target.suffix.lower() != ".svg":
        raise UsageError("the file name of this picture must end in .svg", where=str(target))
    return target


def draw(parity: Parity) -> str:
    """The SVG element, as a file of its own."""
    panels: tuple[Callable[[Parity], Iterator[str]], ...] = (_errors, _agreement, _speed, _memory)
    width, top = 2 * _WIDTH, 64
    height = top + 2 * (_HEIGHT + _GAP)
    body = [_text(_LEFT, 20, f"{parity.model}: B against A on the same steps", "title")]
    for at, (name, side) in enumerate(zip("AB", parity.sides, strict=True)):
        form = f"{side.backend}, {side.matrices}, cache in {side.kv_type}"
        place = 38 + 16 * at
        body.append(
            f'<rect x="{_LEFT}" y="{place - 9}" width="10" height="10" fill="{_HUES[at]}"/>'
        )
        label = f"{name}: {Path(side.path).name} ({form})"
        body.append(_text(_LEFT + 16, place, label[:_LONGEST]))
    for at, panel in enumerate(panels):
        x, y = at % 2 * _WIDTH, top + at // 2 * (_HEIGHT + _GAP)
        body += [f'<g transform="translate({x} {y})">', *panel(parity), "</g>"]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    head += f' width="{width}" height="{height}" role="img">'
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", ground, *body, "</svg>", ""])


def _errors(parity: Parity) -> Iterator[str]:
    """The median and the greatest error of each stretch of positions, on a logarithmic axis."""
    yield _text(_LEFT, 20, "error of logits: median (line) and largest", "title")
    shown = [max(one.error_max, _LEAST) for one in parity.stretches]
    finite = [error for error in shown if math.isfinite(error)] or [1.0]
    medians = [max(one.error_median, _LEAST) for one in parity.stretches]
    low = math.floor(math.log10(min(*finite, *medians, 1.0)))
    high = max(low + 1, math.ceil(math.log10(max(finite))))

    def down(error: float) -> float:
        power = min(math.log10(error), high) if math.isfinite(error) else high
        return _scaled((power - low) / (high - low))

    for power in range(low, high + 1):
        yield from _grid(down(10.0**power), "0" if 10.0**power <= _LEAST else f"1e{power}")
    yield from _positions(parity)
    places = _places(parity)
    points = [(x, down(error)) for x, error in zip(places, medians, strict=True)]
    yield f'<path class="line" stroke="{_HUES[1]}" d="{_path(points)}"/>'
    for x, error in zip(places, shown, strict=True):
        yield f'<circle cx="{x}" cy="{down(error)}" r="3" fill="{_HUES[1]}"/>'


def _agreement(parity: Parity) -> Iterator[str]:
    """The share of rows whose most likely token is the same."""
    yield _text(_LEFT, 20, f"same top token: {100 * parity.top1:.1f} % of all rows", "title")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield from _grid(_scaled(share), f"{100 * share:.0f} %")
    yield from _positions(parity)
    for x, one in zip(_places(parity), parity.stretches, strict=True):
        y = _scaled(one.same_top / one.rows)
        yield _bar(x - 6, y, 12, _scaled(0.0) - y, _HUES[1])


def _speed(parity: Parity) -> Iterator[str]:
    yield _text(_LEFT, 20, "tokens a second, relative to the faster", "title")
    rates = {
        "prefill": [side.prefill.tokens_per_second for side in parity.sides],
        "decode": [side.decode.tokens_per_second for side in parity.sides],
    }
    yield from _bars(rates, lambda rate: f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}")


def _memory(parity: Parity) -> Iterator[str]:
    yield _text(_LEFT, 20, "memory as planned, relative to the larger", "title")
    kinds: dict[str, Callable[[Side], int]] = {
        "weights": lambda side: side.weights_bytes,
        "a step": lambda side: side.step_bytes,
        "a context": lambda side: side.kv_sequence_bytes,
    }
    sizes = {name: [float(size(side)) for side in parity.sides] for name, size in kinds.items()}
    yield from _bars(sizes, lambda size: format_bytes(int(size)))


def _bars(groups: dict[str, list[float]], spell: Callable[[float], str]) -> Iterator[str]:
    """Pairs of bars, each relative to the greater of the pair, with what they stand for."""
    room = (_WIDTH - _LEFT - _RIGHT) / len(groups)
    yield from _grid(_scaled(0.0), "0")
    for at, (name, values) in enumerate(groups.items()):
        middle = round(_LEFT + (at + 0.5) * room, 1)
        for side, value in enumerate(values):
            y = _scaled(0.92 * value / (max(values) or 1.0))
            x = middle + (4 if side else -46)
            yield _bar(x, y, 42, _scaled(0.0) - y, _HUES[side])
            yield _text(x + 21, y - 4, spell(value) if value else "-", "amount", anchor="middle")
        yield _text(middle, _HEIGHT - _BOTTOM + 16, name, anchor="middle")


def _places(parity: Parity) -> list[float]:
    """Where the middle of each stretch lies."""
    count = parity.stretches[-1].last + 1
    room = _WIDTH - _LEFT - _RIGHT
    middles = [(one.first + one.last + 1) / 2 for one in parity.stretches]
    return [round(_LEFT + middle / count * room, 1) for middle in middles]


def _positions(parity: Parity) -> Iterator[str]:
    places = _places(parity)
    for at in sorted({0, len(places) // 2, len(places) - 1}):
        label = str(parity.stretches[at].first)
        yield _text(places[at], _HEIGHT - _BOTTOM + 16, label, anchor="middle")
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "position", anchor="middle")


def _scaled(share: float) -> float:
    """The place of a share of the height, from the bottom."""
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)


def _grid(y: float, label: str) -> Iterator[str]:
    yield f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>'
    yield _text(_LEFT - 6, y + 4, label, anchor="end")


def _bar(x: float, y: float, width: float, height: float, hue: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0):.1f}"'
    return f'<rect {place} fill="{hue}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text{style} {place}>{escape(printable(text))}</text>"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)
