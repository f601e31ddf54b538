"""Where the cards of a drawing lie: rows by longest path, long edges in lanes beside the cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .graph_model import PORT, VIEW, Block, Card, Part

BLOCK_WIDTH = 316
CARD_WIDTH = 236
CARD_HEIGHT = 50
PILL_HEIGHT = 24
ROW_GAP = 18
LANE_GAP = 10
MARGIN = 24
COLUMN_GAP = 56
PART_PAD = 8
PART_HEAD = 18
BLOCK_HEAD = 40
COLUMNS = 4
_CARD_GAP = 6

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """The x of its centre."""
        return self.x + self.width / 2

    @property
    def right(self) -> float:
        """The x of its right side."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The y of its lower side."""
        return self.y + self.height


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """A part with its frame, which is None for one without title."""

    title: str
    frame: Box | None


@dataclass(frozen=True, slots=True)
class Edge:
    """A line through points from one card to another; `long` ones run in a lane."""

    points: tuple[Point, ...]
    long: bool


@dataclass(slots=True)
class PlacedBlock:
    """A block with everything in it placed."""

    block: Block
    frame: Box
    parts: list[PlacedPart] = field(default_factory=list)
    cards: list[tuple[Card, Box]] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A whole drawing: its size, its blocks, and the lines from block to block."""

    width: float
    height: float
    blocks: list[PlacedBlock]
    flows: list[tuple[Point, ...]]


def lay_out(blocks: Sequence[Block]) -> Drawing:
    """Blocks in columns from left to right; stacked ones below the one before."""
    columns: list[list[Block]] = []
    for index, block in enumerate(blocks):
        if block.stacked and index and columns:
            columns[-1].append(block)
        else:
            columns.append([block])
    placed: list[PlacedBlock] = []
    flows: list[tuple[Point, ...]] = []
    top = float(MARGIN)
    for start in range(0, len(columns), COLUMNS):
        bottom = top
        for place, column in enumerate(columns[start : start + COLUMNS]):
            x, y = MARGIN + place * (BLOCK_WIDTH + COLUMN_GAP), top
            for block in column:
                one = _place_block(block, x, y)
                if placed:
                    flows.append(_flow(placed[-1].frame, one.frame))
                placed.append(one)
                y = one.frame.bottom + 2 * ROW_GAP
            bottom = max(bottom, placed[-1].frame.bottom)
        top = bottom + 3 * ROW_GAP
    width = max((one.frame.right for one in placed), default=0.0) + MARGIN
    height = max((one.frame.bottom for one in placed), default=0.0) + MARGIN
    return Drawing(width, height, placed, flows)


def _flow(a: Box, b: Box) -> tuple[Point, ...]:
    """From the bottom of one block to the top of the next: down, or around through the gap."""
    start, end = (a.middle, a.bottom), (b.middle, b.y)
    if a.x == b.x:
        return start, end
    below, above = a.bottom + ROW_GAP / 1.5, b.y - ROW_GAP / 1.5
    gap = b.x - COLUMN_GAP / 2 if b.x > a.x else b.x - MARGIN / 2
    return start, (a.middle, below), (gap, below), (gap, above), (b.middle, above), end


def _place_block(block: Block, x: float, y: float) -> PlacedBlock:
    placed = PlacedBlock(block, Box(x, y, BLOCK_WIDTH, 0))
    rows: list[list[tuple[Card, Box]]] = []
    left = x + 18
    at = y + BLOCK_HEAD
    for part in block.parts:
        top = at
        if part.title:
            at += PART_HEAD
        for row in _rows(part):
            cells = list(_place_row(row, left, at))
            rows.append(cells)
            at += max(box.height for _, box in cells) + ROW_GAP
        if part.title:
            height = at - ROW_GAP + PART_PAD - top
            frame = Box(left - PART_PAD, top, CARD_WIDTH + 2 * PART_PAD, height)
            placed.parts.append(PlacedPart(part.title, frame))
            at += PART_PAD
    placed.cards = [cell for row in rows for cell in row]
    placed.edges = list(_edges(rows))
    lanes = [point[0] for edge in placed.edges for point in edge.points if edge.long]
    right = max([left + CARD_WIDTH + PART_PAD, *lanes]) + 14
    placed.frame = Box(x, y, max(BLOCK_WIDTH, right - x), at - y - ROW_GAP + 14)
    return placed


def _rows(part: Part) -> list[list[Card]]:
    """Cards by the longest path that leads to them within the part."""
    ranks: dict[str, int] = {}
    rows: list[list[Card]] = []
    for card in part.cards:
        rank = max((ranks[name] + 1 for name in card.reads if name in ranks), default=0)
        if card.kind == PORT:
            rank = 0
        ranks[card.id] = rank
        while len(rows) <= rank:
            rows.append([])
        rows[rank].append(card)
    return rows


def _place_row(row: Sequence[Card], left: float, top: float) -> Iterator[tuple[Card, Box]]:
    width = (CARD_WIDTH - _CARD_GAP * (len(row) - 1)) / len(row)
    for place, card in enumerate(row):
        height = PILL_HEIGHT if card.kind in (VIEW, PORT) else CARD_HEIGHT
        x = left + place * (width + _CARD_GAP)
        yield card, Box(x, top, width, height)


def _edges(rows: Sequence[Sequence[tuple[Card, Box]]]) -> Iterator[Edge]:
    at = {card.id: (index, box) for index, row in enumerate(rows) for card, box in row}
    lanes: list[float] = []  # the y down to which each lane is taken
    wide = max((box.right for row in rows for _, box in row), default=0.0) + PART_PAD
    for index, row in enumerate(rows):
        for card, box in row:
            for name in card.reads:
                start, source = at[name]
                if start == index - 1:
                    yield Edge(((source.middle, source.bottom), (box.middle, box.y)), False)
                    continue
                lane = next((i for i, end in enumerate(lanes) if end < source.bottom), len(lanes))
                if lane == len(lanes):
                    lanes.append(0.0)
                lanes[lane] = box.y
                rightmost = box.right == row[-1][1].right
                yield Edge(_long(source, box, wide + LANE_GAP * (lane + 1), rightmost), True)


def _long(source: Box, box: Box, lane: float, rightmost: bool) -> tuple[Point, ...]:
    """Down, across to the lane, down it, and into the card from its right or from above."""
    below = source.bottom + ROW_GAP * 0.45
    start = ((source.middle, source.bottom), (source.middle, below), (lane, below))
    if rightmost:
        middle = box.y + box.height / 2
        return (*start, (lane, middle), (box.right, middle))
    above = box.y - ROW_GAP * 0.45
    return (*start, (lane, above), (box.middle, above), (box.middle, box.y))
