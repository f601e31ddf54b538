"""Attention over paged keys and values; pages as in `positions.py`.

Scores and sums are float32. Queries and the weights of values are rounded to the type of the cache
(bfloat16 for codes of int8 or e4m3), which tensor cores multiply; in a float32 cache nothing is
rounded.
"""

import triton
import triton.language as tl

from .e4m3 import levels
from .numbers import tanh

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tiles(
    q,
    pages,
    scales,
    sinks,
    out,
    starts,
    lengths,
    tile_sequences,
    tile_rows,
    table,
    scale,
    cap,
    Q_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_BLOCK: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINK: tl.constexpr,
):
    """Program (tile, KV head): TILE rows of one sequence, times the query heads that share it."""
    tile = tl.program_id(0)
    g = tl.program_id(1)
    sequence = tl.load(tile_sequences + tile)
    row_in = tl.load(tile_rows + tile)
    begin = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1)
    length = tl.load(lengths + sequence)
    SHARE: tl.constexpr = HEADS // G
    i = tl.arange(0, BM)
    row = begin + row_in + i // SHARE
    head = g * SHARE + i % SHARE
    live = (i < TILE * SHARE) & (row < end)
    position = length - end + row
    query = _queries(q, pages, row, head, live, Q_STRIDE, D, D_BLOCK)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - end + begin + row_in - WINDOW + 1, 0)
    last = tl.minimum(length, length - end + begin + row_in + TILE)
    m, total, acc = _walk(
        query, pages, scales, table + sequence * TABLE_WIDTH, position, g, first, last, scale, cap,
        G, D, DV, D_BLOCK, DV_BLOCK, BM, BN, PAGE, BLOCK_SIZE, WINDOW, CAP,
    )  # fmt: skip
    if SINK:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
        most = tl.maximum(m, sink)
        shrink = tl.exp2((m - most) * LOG2E)
        total = total * shrink + tl.exp2((sink - most) * LOG2E)
        acc = acc * shrink[:, None]
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    dv = tl.arange(0, DV_BLOCK)
    place = out + row[:, None].to(tl.int64) * (HEADS * DV) + head[:, None] * DV + dv[None, :]
    mask = live[:, None] & (dv[None, :] < DV)
    tl.store(place, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def attend_splits(
    q,
    pages,
    scales,
    sinks,
    out,
    partial,
    tops,
    arrived,
    lengths,
    table,
    scale,
    cap,
    Q_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_BLOCK: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINK: tl.constexpr,
):
    """Program (row, KV head, split): the only query of a sequence over SPLIT positions.

    Split s begins at position s * SPLIT, wherever the sequence ends. It leaves its sums in
    partial[row, head, s, DV], their maximum and their divisor in tops[row, head, s, 2]. The last
    to arrive of a row and KV head merges all of them from left to right, so that the result does
    not depend on which one that is, and sets arrived[row, g] to 0 again. A sequence of length 0
    gives zeros.
    """
    row = tl.program_id(0)
    g = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    SHARE: tl.constexpr = HEADS // G
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    first_split = begin // SPLIT
    last_split = tl.maximum(tl.cdiv(length, SPLIT), 1)
    if (split >= first_split) & (split < last_split):
        i = tl.arange(0, BM)
        head = g * SHARE + i
        live = i < SHARE
        rows = tl.zeros((BM,), tl.int32) + row
        position = tl.zeros((BM,), tl.int32) + (length - 1)
        query = _queries(q, pages, rows, head, live, Q_STRIDE, D, D_BLOCK)
        first = tl.maximum(split * SPLIT, begin)
        last = tl.minimum(length, (split + 1) * SPLIT)
        m, total, acc = _walk(
            query, pages, scales, table + row * TABLE_WIDTH, position, g, first, last, scale, cap,
            G, D, DV, D_BLOCK, DV_BLOCK, BM, BN, PAGE, BLOCK_SIZE, WINDOW, CAP,
        )  # fmt: skip
        place = (row.to(tl.int64) * HEADS + head) * SPLITS
        tl.store(tops + (place + split) * 2, m, mask=live)
        tl.store(tops + (place + split) * 2 + 1, total, mask=live)
        dv = tl.arange(0, DV_BLOCK)
        wide = live[:, None] & (dv[None, :] < DV)
        tl.store(partial + (place + split)[:, None] * DV + dv[None, :], acc, mask=wide)
        # All threads have stored before one counts; others see what they stored once they see it.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + row * G + g, 1, sem="acq_rel", scope="gpu")
        if before == last_split - first_split - 1:
            tl.store(arrived + row * G + g, 0)
            _merge(
                partial, tops, sinks, out, place, row, head, live, first_split, last_split,
                HEADS, DV, DV_BLOCK, BM, SINK,
            )  # fmt: skip


@triton.jit
def _merge(
    partial,
    tops,
    sinks,
    out,
    place,
    row,
    head,
    live,
    first,
    last,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    SINK: tl.constexpr,
):
    """The sums of the splits first .. last - 1 of some heads, from left to right."""
    most = tl.full((BM,), -float("inf"), tl.float32)
    for split in range(first, last):
        top = tl.load(tops + (place + split) * 2, mask=live, other=-float("inf"))
        most = tl.maximum(most, top)
    if SINK:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
        most = tl.maximum(most, sink)
    most = tl.where(most == -float("inf"), 0.0, most)
    dv = tl.arange(0, DV_BLOCK)
    wide = live[:, None] & (dv[None, :] < DV)
    acc = tl.zeros((BM, DV_BLOCK), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for split in range(first, last):
        at = place + split
        top = tl.load(tops + at * 2, mask=live, other=-float("inf"))
        share = tl.exp2((top - most) * LOG2E)
        total += tl.load(tops + at * 2 + 1, mask=live, other=0.0) * share
        part = tl.load(partial + at[:, None] * DV + dv[None, :], mask=wide, other=0.0)
        acc += part * share[:, None]
    if SINK:
        total += tl.exp2((sink - most) * LOG2E)
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out + (row.to(tl.int64) * HEADS + head)[:, None] * DV + dv[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=wide)


@triton.jit
def _queries(
    q, pages, row, head, live, Q_STRIDE: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr
):
    d = tl.arange(0, D_BLOCK)
    place = q + row[:, None].to(tl.int64) * Q_STRIDE + head[:, None] * D + d[None, :]
    query = tl.load(place, mask=live[:, None] & (d[None, :] < D), other=0.0)
    if pages.dtype.element_ty.is_int():
        return query.to(tl.bfloat16)
    else:
        return query.to(pages.dtype.element_ty)


@triton.jit
def _numbers(stored, KIND: tl.constexpr):
    """What elements or codes of a page stand for, in a type that holds all of them."""
    if stored.dtype == tl.uint8:
        return levels(stored).to(KIND)
    else:
        return stored.to(KIND)


@triton.jit
def _walk(
    query,
    pages,
    scales,
    blocks,
    position,
    g,
    first,
    last,
    scale,
    cap,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_BLOCK: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    """Maxima, sums of weights and weighted values over positions first .. last - 1.

    Blocks of BN positions begin at absolute multiples of BN. What is outside is not read: freed
    blocks and the rest of a page may hold NaN.
    """
    d = tl.arange(0, D_BLOCK)
    dv = tl.arange(0, DV_BLOCK)
    n = tl.arange(0, BN)
    kind: tl.constexpr = query.dtype
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DV_BLOCK), tl.float32)
    for at in range(first // BN * BN, last, BN):
        key = at + n
        inside = (key >= first) & (key < last)
        block = tl.load(blocks + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        cell = g * BLOCK_SIZE + key % BLOCK_SIZE
        keys = pages + block * PAGE + cell * D
        mask = inside[None, :] & (d[:, None] < D)
        k = _numbers(tl.load(keys[None, :] + d[:, None], mask=mask, other=0), kind)
        values = pages + block * PAGE + G * BLOCK_SIZE * D + cell * DV
        mask = inside[:, None] & (dv[None, :] < DV)
        v = _numbers(tl.load(values[:, None] + dv[None, :], mask=mask, other=0), kind)
        score = tl.dot(query, k, input_precision="ieee")
        if pages.dtype.element_ty.is_int():
            unit = scales + block * (PAGE // 4) + cell
            score = score * tl.load(unit, mask=inside, other=0.0)[None, :]
        score = score * scale
        if CAP:
            score = cap * tanh(score / cap)
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (position[:, None] - key[None, :] < WINDOW)
        score = tl.where(seen, score, -float("inf"))
        most = tl.maximum(m, tl.max(score, 1))
        base = tl.where(most == -float("inf"), 0.0, most)
        shrink = tl.exp2((m - base) * LOG2E)
        weight = tl.exp2((score - base[:, None]) * LOG2E)
        total = total * shrink + tl.sum(weight, 1)
        if pages.dtype.element_ty.is_int():
            unit = scales + block * (PAGE // 4) + G * BLOCK_SIZE + cell
            weight = weight * tl.load(unit, mask=inside, other=0.0)[None, :]
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(kind), v, acc, input_precision="ieee")
        m = most
    return m, total, acc
