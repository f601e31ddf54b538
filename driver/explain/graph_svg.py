"""A laid-out program as SVG: standing alone with its style, or as a part of a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from .amounts import format_bytes, format_operations, format_share, moved_bytes, printable
from .facts import NO_COSTS, ArtifactFacts, Costs, WeightFacts
from .graph_layout import Box, Drawing, Edge, PlacedBlock, Point, lay_out
from .graph_model import PORT, VIEW, Block, Card, build_blocks

METRICS = ("decode-bytes", "decode-ops", "prefill-bytes", "prefill-ops")
_TITLE_PX, _MONO_PX = 7.4, 6.3
_ROUND = 6.0
_WIDE = 150
"""From this width on a card has room for its share."""


def draw(facts: ArtifactFacts, blocks: Sequence[Block], *, alone: bool) -> str:
    """The SVG element; `alone` with style and namespace, as a file of its own needs them."""
    layout = lay_out(blocks)
    total = facts.program.total if facts.program else NO_COSTS
    body = "\n".join(_body(layout, total))
    size = f'viewBox="0 0 {layout.width:.0f} {layout.height:.0f}"'
    size += f' width="{layout.width:.0f}" height="{layout.height:.0f}"'
    label = f"{facts.manifest.model.architecture}, the program that the artifact runs"
    head = f'<svg class="graph" {size} role="img" aria-label="{attribute(label)}"'
    if not alone:
        return f"{head}>\n{body}\n</svg>"
    style = files(__package__).joinpath("graph.css").read_text(encoding="utf-8")
    ground = '<rect class="ground" width="100%" height="100%"/>'
    namespace = 'xmlns="http://www.w3.org/2000/svg"'
    return f"{head} {namespace}>\n<style>\n{style}</style>\n{ground}\n{body}\n</svg>\n"


def svg_page(facts: ArtifactFacts) -> str:
    """A drawing that stands alone: light or dark as the reader's system is."""
    assert facts.program is not None
    return draw(facts, build_blocks(facts.program), alone=True)


def shares(costs: Costs, total: Costs, copies: int) -> dict[str, float]:
    """By metric, which part of the whole step a card and its copies are, 0 to 1."""
    own = (
        moved_bytes(costs.decode),
        costs.decode.flops,
        moved_bytes(costs.prefill),
        costs.prefill.flops,
    )
    whole = (
        moved_bytes(total.decode),
        total.decode.flops,
        moved_bytes(total.prefill),
        total.prefill.flops,
    )
    pairs = zip(METRICS, own, whole, strict=True)
    return {name: copies * part / all_ if all_ else 0.0 for name, part, all_ in pairs}


def card_costs(card: Card) -> Costs:
    """What the nodes of a card move and compute together, in one layer."""
    return sum((node.costs for node in card.nodes), NO_COSTS)


def attribute(text: str) -> str:
    """Text as it may stand between quotes, or between tags."""
    return escape(printable(text), quote=True)


def _body(layout: Drawing, total: Costs) -> Iterator[str]:
    yield (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    for points in layout.flows:
        yield f'<path class="flow" d="{_path(points)}" marker-end="url(#tip)"/>'
    for block in layout.blocks:
        yield from _block(block, total)


def _block(placed: PlacedBlock, total: Costs) -> Iterator[str]:
    box, block = placed.frame, placed.block
    if block.copies > 1:  # the edges of those behind it
        for shift in (8, 4):
            behind = Box(box.x + shift, box.y + shift, box.width, box.height)
            yield f'<rect class="block behind" {_at(behind)} rx="10"/>'
    yield f'<rect class="block" {_at(box)} rx="10"/>'
    yield _text("title", box.x + 16, box.y + 25, block.title)
    if block.copies > 1:
        badge = Box(box.right - 62, box.y + 10, 48, 20)
        yield f'<rect class="badge" {_at(badge)} rx="10"/>'
        yield _text("badge-text", badge.middle, badge.y + 14, f"×{block.copies}")
    for part in placed.parts:
        if part.frame is not None:
            yield f'<rect class="part" {_at(part.frame)} rx="7"/>'
            yield _text("part-title", part.frame.x + 8, part.frame.y + 13, part.title)
    for edge in placed.edges:
        yield _edge(edge)
    for card, place in placed.cards:
        yield from _card(card, place, total)


def _edge(edge: Edge) -> str:
    if edge.long:
        return f'<path class="edge long" d="{_path(edge.points)}" marker-end="url(#tip)"/>'
    (x1, y1), (x2, y2) = edge.points
    middle = (y1 + y2) / 2
    curve = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2 - 1:.1f}"
    return f'<path class="edge" d="{curve}" marker-end="url(#tip)"/>'


def _card(card: Card, box: Box, total: Costs) -> Iterator[str]:
    if card.kind == PORT:
        yield f'<g class="port"><rect {_at(box)} rx="12"/>'
        room = int((box.width - 12) / _MONO_PX)
        long = len(card.title) > room  # then its end, which tells more than its beginning
        title = f"…{card.title[1 - room :]}" if long else card.title
        yield _text("port-text", box.middle, box.y + 16, title)
        yield "</g>"
        return
    nodes = card.nodes
    data = f'data-card="{attribute(card.id)}" tabindex="0" role="button"'
    own = shares(card_costs(card), total, card.copies)
    heat = f'style="--heat:{heat_of(own[METRICS[0]]):.1f}%"'
    yield f'<g class="card kind-{attribute(card.kind)}" {heat} {data}>'
    yield f"<title>{attribute(_tooltip(card))}</title>"
    yield f'<rect class="face" {_at(box)} rx="{12 if card.kind == VIEW else 6}"/>'
    kind = nodes[-1].results[0][1] if nodes[-1].results else ""
    if card.kind == VIEW:
        shape = kind[kind.find("[") :] if box.width < 120 else f"{card.title} {kind}"
        text = _fit(shape, box.width - 10, _MONO_PX)
        yield _text("view-text", box.middle, box.y + 16, text)
    else:
        yield from _face(card, box, kind, own)
    yield "</g>"


def _face(card: Card, box: Box, kind: str, own: Mapping[str, float]) -> Iterator[str]:
    node = card.nodes[-1]
    heavy = max(node.weights, key=lambda weight: weight.num_bytes, default=None)
    wide = box.width >= _WIDE
    title = _fit(card.title, box.width - (62 if wide else 16), _TITLE_PX)
    room = box.width - 76 - len(title) * _TITLE_PX
    leaf = _fit(_leaf(heavy), room, _MONO_PX) if heavy and room > 5 * _MONO_PX else ""
    yield (
        f'<text class="op" x="{box.x + 10:.1f}" y="{box.y + 17:.1f}">{attribute(title)}'
        f'<tspan class="leaf" dx="6">{attribute(leaf)}</tspan></text>'
    )
    percent = format_share(math.ceil(own[METRICS[0]] * 10**9), 10**9)
    yield _text("share", box.right - 10, box.y + 17, percent if wide else "")
    text = kind if heavy is None else f"{heavy.type} → {kind[kind.find('[') :]}"
    yield _text("type", box.x + 10, box.y + 33, _fit(text, box.width - 20, _MONO_PX))
    track = Box(box.x + 10, box.bottom - 10, box.width - 20, 4)
    yield f'<rect class="track" {_at(track)} rx="2"/>'
    values = " ".join(f'data-{name}="{value:.5f}"' for name, value in own.items())
    full = Box(track.x, track.y, track.width * own[METRICS[0]], 4)
    yield f'<rect class="bar" {_at(full)} rx="2" data-full="{track.width:.1f}" {values}/>'


def heat_of(share: float) -> float:
    """How strong a card's colour is, in percent more than the least; the page's script agrees."""
    return 30 * math.sqrt(share)


def _leaf(weight: WeightFacts) -> str:
    """The module that a weight belongs to, without its path: "q_proj"."""
    parts = weight.name.split(".")
    if parts[0] == "table":  # a constant of our own, named by its digest
        return ""
    return parts[parts.index("weight") - 1] if "weight" in parts[1:] else parts[-1]


def _tooltip(card: Card) -> str:
    costs = card_costs(card)
    lines = [f"{node.op} ({node.source or 'made by a pass'})" for node in card.nodes]
    lines += [f"{w.operand}: {w.name} {w.type}" for node in card.nodes for w in node.weights]
    for name, cost in (("decode", costs.decode), ("prefill", costs.prefill)):
        moved, work = format_bytes(moved_bytes(cost)), format_operations(cost.flops)
        lines.append(f"{name}: {moved}, {work} operations")
    return "; ".join(lines)


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{attribute(text)}</text>'


def _at(box: Box) -> str:
    return f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'


def _fit(text: str, width: float, per_character: float) -> str:
    room = max(1, int(width / per_character))
    return text if len(text) <= room else text[: room - 1] + "…"


def _path(points: Sequence[Point]) -> str:
    """Straight lines with round corners."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        a, b = _towards(corner, before), _towards(corner, after)
        parts.append(
            f"L{a[0]:.1f} {a[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        )
    parts.append(f"L{points[-1][0]:.1f} {points[-1][1]:.1f}")
    return "".join(itertools.chain(parts))


def _towards(start: Point, end: Point) -> Point:
    """The point a corner's radius from `start` on the way to `end`, at most half of it."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5
    if length == 0:
        return start
    share = min(_ROUND, length / 2) / length
    return start[0] + dx * share, start[1] + dy * share
