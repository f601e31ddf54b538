"""Kernels of a model that is checked through its cache: those of `PagedModel`, on raw memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infc.runtime.sampling.adjustments import ADJUSTED, Adjustments, adjusted_row
from infc.runtime.sampling.draws import DRAW, Draw
from infc.runtime.sampling.sampler import drawn_token, greatest_token
from infc.runtime.scheduling.step import NO_TOKEN

from ..paged_model import _EMPTY, hidden_of, logits_of, mix
from .late_driver import Memory, kernel

Grid = tuple[int, ...]


@kernel("PPPi")
def resolve_carried(
    m: Memory, grid: Grid, token_ids: int, carried: int, before: int, count: int
) -> None:
    for place, draw in m.array(carried, 2 * count).reshape(-1, 2).tolist():
        if place >= 0:
            token = int(m.array(before + 4 * draw, 1)[0])
            m.array(token_ids + 4 * place, 1)[0] = max(token, 0)


@kernel("PPi")
def copy_blocks(m: Memory, grid: Grid, pages: int, pairs: int, block_bytes: int) -> None:
    for source, target in m.array(pairs, 2 * grid[0]).reshape(-1, 2).tolist():
        if source != target:
            block = m.view(pages + source * block_bytes, block_bytes).copy()
            m.view(pages + target * block_bytes, block_bytes)[:] = block


@kernel("PP")
def embed(m: Memory, grid: Grid, token_ids: int, out: int) -> None:
    """One element of 64 bits for each token, which padding has as well."""
    tokens = m.array(token_ids, grid[0])
    assert tokens.min() >= 0
    m.array(out, grid[0], np.int64)[:] = tokens


def _attend(
    m: Memory, row: int, position: int, x: int, pages: int, slots: int, table: int, size: int
) -> int:
    """The state after the token of a row, which is stored; `table` is its sequence's."""

    def slot_of(where: int) -> int:
        block = int(m.array(table + 4 * (where // size), 1)[0])
        assert block > 0, "the null block is read"
        return block * size + where % size

    state = _EMPTY
    if position:
        state = int(m.array(pages + 8 * slot_of(position - 1), 1, np.int64)[0])
    token = int(m.array(x + 8 * row, 1, np.int64)[0])
    slot = int(m.array(slots + 4 * row, 1)[0])
    assert slot == slot_of(position), "tokens are stored where nobody looks for them"
    after = mix(state, token)
    m.array(pages + 8 * slot, 1, np.int64)[0] = after
    return after


@kernel("PPPPPPii")
def attend_rows(
    m: Memory, grid: Grid, x: int, pages: int, slots: int, table: int, lengths: int, out: int,
    size: int, width: int,
) -> None:  # fmt: skip
    """One query a sequence. Rows of padding store nothing, and read no page."""
    for row in range(grid[0]):
        length = int(m.array(lengths + 4 * row, 1)[0])
        if length == 0:
            assert m.array(slots + 4 * row, 1)[0] == -1
            continue
        mine = table + 4 * row * width
        after = _attend(m, row, length - 1, x, pages, slots, mine, size)
        m.array(out + 8 * row, 1, np.int64)[0] = after


@kernel("PPPPPPPPPiii")
def attend_tiles(
    m: Memory, grid: Grid, x: int, pages: int, slots: int, table: int, starts: int, lengths: int,
    tile_sequences: int, tile_rows: int, out: int, size: int, width: int, tile: int,
) -> None:  # fmt: skip
    for place in range(grid[0]):
        b = int(m.array(tile_sequences + 4 * place, 1)[0])
        first = int(m.array(tile_rows + 4 * place, 1)[0])
        begin, end = m.array(starts + 4 * b, 2).tolist()
        length = int(m.array(lengths + 4 * b, 1)[0])
        assert first % tile == 0 and begin + first < end
        for row in range(begin + first, min(end, begin + first + tile)):
            mine = table + 4 * b * width
            after = _attend(m, row, length - end + row, x, pages, slots, mine, size)
            m.array(out + 8 * row, 1, np.int64)[0] = after


@kernel("PPPP")
def take(m: Memory, grid: Grid, first: int, other: int, index: int, out: int) -> None:
    """Rows of the first of two groups; the other is computed for its cache alone."""
    rows = m.array(index, grid[0]).tolist()
    states = [m.array(first + 8 * row, 1, np.int64)[0] for row in rows]
    m.array(out, grid[0], np.int64)[:] = states


@kernel("PPi")
def head(m: Memory, grid: Grid, states: int, logits: int, vocab: int) -> None:
    for r, state in enumerate(m.array(states, grid[0], np.int64).tolist()):
        m.array(logits + 4 * r * vocab, vocab, np.float32)[:] = logits_of(state, vocab)


@kernel("PPi")
def hidden(m: Memory, grid: Grid, states: int, out: int, width: int) -> None:
    for r, state in enumerate(m.array(states, grid[0], np.int64).tolist()):
        m.array(out + 4 * r * width, width, np.float32)[:] = hidden_of(state, width)


@kernel("PPPPPPPPPPPiiP")
def adjust(
    m: Memory, grid: Grid, logits: int, draws: int, adjusted: int, bias_ids: int, bias: int,
    count_ids: int, counts: int, masks: int, token_ids: int, index: int, carried: int,
    num_carried: int, vocab: int, out: int,
) -> None:  # fmt: skip
    """A changed row for each record; entries of padding change nothing."""
    records = m.array(adjusted, grid[0], ADJUSTED)
    num_bias, num_counts = int(records["bias_end"].max()), int(records["counts_end"].max())
    words, num_masks = -(-vocab // 32), int(records["mask"].max()) + 1
    found = Adjustments(
        rows=records,
        bias_ids=m.array(bias_ids, num_bias),
        bias=m.array(bias, num_bias, np.float32),
        count_ids=m.array(count_ids, num_counts),
        counts=m.array(counts, num_counts),
        masks=m.array(masks, num_masks * words, np.uint32).reshape(num_masks, words),
    )
    places = m.array(carried, 2 * num_carried).reshape(-1, 2)[:, 0].tolist()
    for a, record in enumerate(records):
        row = int(m.array(draws, int(record["draw"]) + 1, DRAW)["row"][-1])
        last = int(m.array(index + 4 * row, 1)[0])
        token = int(m.array(token_ids + 4 * last, 1)[0]) if last in places else None
        scores = m.array(logits + 4 * row * vocab, vocab, np.float32)
        m.array(out + 4 * a * vocab, vocab, np.float32)[:] = adjusted_row(scores, found, a, token)


@kernel("PPPiPiP")
def draw_tokens(
    m: Memory, grid: Grid, logits: int, draws: int, adjusted: int, count: int, changed: int,
    vocab: int, tokens: int,
) -> None:  # fmt: skip
    places: dict[int, int] = {}
    if count:
        drawn = m.array(adjusted, count, ADJUSTED)["draw"].tolist()
        assert drawn == sorted(set(drawn)), "records are not in the order of their draws"
        places = {draw: place for place, draw in enumerate(drawn)}
    for d, entry in enumerate(m.array(draws, grid[0], DRAW)):
        draw = Draw(*entry.item())
        base = logits + 4 * draw.row * vocab
        if d in places:
            base = changed + 4 * places[d] * vocab
        row: NDArray[np.float32] = m.array(base, vocab, np.float32)
        token = drawn_token(row, draw) if greatest_token(row) is not None else None
        m.array(tokens + 4 * d, 1)[0] = NO_TOKEN if token is None else token


@kernel("PPPi")
def pick_rows(m: Memory, grid: Grid, logits: int, index: int, out: int, vocab: int) -> None:
    for place, row in enumerate(m.array(index, grid[0]).tolist()):
        source = m.array(logits + 4 * row * vocab, vocab, np.float32)
        m.array(out + 4 * place * vocab, vocab, np.float32)[:] = source


@kernel("PP")
def sum_rows(m: Memory, grid: Grid, rows: int, out: int) -> None:
    """Sums of rows of three, for a program that takes other arrays than tokens."""
    given = m.array(rows, 3 * grid[0], np.float32).reshape(-1, 3)
    m.array(out, grid[0], np.float32)[:] = given.sum(1)
