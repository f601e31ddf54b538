"""Routed experts: rows are ordered by expert, multiplied in tiles of one expert, and summed."""

import triton
import triton.language as tl

from .numbers import activate, sigmoid


@triton.jit
def count_routes(index, counts, num_routes, BLOCK: tl.constexpr):
    """counts[e] = how many routes lead to expert e. Program e."""
    expert = tl.program_id(0)
    count = 0
    for first in range(0, num_routes, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found = tl.load(index + at, mask=at < num_routes, other=-1)
        count += tl.sum((found == expert).to(tl.int32), 0)
    tl.store(counts + expert, count)


@triton.jit
def place_routes(
    index,
    counts,
    routes,
    tile_experts,
    num_routes,
    num_tiles,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """routes[..] = the routes of each expert in order, filled up to whole tiles with -1.

    tile_experts[i] is the expert of tile i, -1 behind the last. Program e; the last one fills up.
    """
    expert = tl.program_id(0)
    i = tl.arange(0, EXPERTS_BLOCK)
    tiles = (tl.load(counts + i, mask=i < EXPERTS, other=0) + TILE - 1) // TILE
    before = tl.sum(tl.where(i < expert, tiles, 0), 0)
    mine = tl.sum(tl.where(i == expert, tiles, 0), 0)
    j = tl.arange(0, BLOCK)
    for first in range(0, mine, BLOCK):
        tl.store(tile_experts + before + first + j, expert + j * 0, mask=first + j < mine)
    if expert == EXPERTS - 1:
        for first in range(before + mine, num_tiles, BLOCK):
            tl.store(tile_experts + first + j, j * 0 - 1, mask=first + j < num_tiles)
    place = before * TILE
    for first in range(0, num_routes, BLOCK):
        at = first + j
        found = (tl.load(index + at, mask=at < num_routes, other=-1) == expert).to(tl.int32)
        where = place + tl.cumsum(found, 0) - 1
        tl.store(routes + where, at, mask=found > 0)
        place += tl.sum(found, 0)
    for first in range(place, (before + mine) * TILE, BLOCK):
        tl.store(routes + first + j, j * 0 - 1, mask=first + j < (before + mine) * TILE)


@triton.jit
def expert_linear(
    x,
    w,
    bias,
    out,
    routes,
    tile_experts,
    N,
    K,
    x_stride,
    SHARE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """out[route, :] = x[route // SHARE, :] @ w[expert].T + bias[expert], as `linear` rounds.

    Program (tile of N, tile of routes of one expert).
    """
    expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        route = tl.load(routes + tl.program_id(1) * BM + tl.arange(0, BM))
        live = route >= 0
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        row = expert * N + n
        left = x + (route // SHARE)[:, None].to(tl.int64) * x_stride + k[None, :]
        right = w + row[None, :] * K + k[:, None]
        live_n = n[None, :] < N
        acc = tl.zeros((BM, BN), tl.float32)
        for at in range(0, K, BK):
            if EVEN:
                a = tl.load(left, mask=live[:, None], other=0.0)
                b = tl.load(right, mask=live_n, other=0.0)
            else:
                a = tl.load(left, mask=live[:, None] & (k[None, :] < K - at), other=0.0)
                b = tl.load(right, mask=live_n & (k[:, None] < K - at), other=0.0)
            if w.dtype.element_ty == tl.float32:
                acc = tl.dot(a.to(tl.float32), b, acc, input_precision="ieee")
            else:
                acc = tl.dot(a.to(w.dtype.element_ty), b, acc)
            left += BK
            right += BK
        if BIAS:
            acc += tl.load(bias + row, mask=n < N, other=0.0).to(tl.float32)[None, :]
        place = out + route[:, None].to(tl.int64) * N + n[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=live[:, None] & live_n)


@triton.jit
def expert_gate(
    x,
    out,
    alpha,
    limit,
    shift,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    PLAIN: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """out[r, :] = act(gate) * (up + shift) of x[r, gate then up]. Program (r, columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < WIDTH
    gate = tl.load(x + row * (2 * WIDTH) + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * (2 * WIDTH) + WIDTH + at, mask=live, other=0.0).to(tl.float32)
    if LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if PLAIN:
        turned = activate(gate, ACT)
    else:
        turned = gate * sigmoid(alpha * gate)
    value = turned * (up + shift)
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def sum_slots(x, weight, out, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, :] = the sum over slots k, in order, of weight[t, k] * x[t * SLOTS + k, :].

    Program (t, columns).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(0, SLOTS):
        share = tl.load(weight + row * SLOTS + slot).to(tl.float32)
        value = tl.load(x + (row * SLOTS + slot) * WIDTH + at, mask=live, other=0.0)
        total += share * value.to(tl.float32)
    tl.store(out + row * WIDTH + at, total.to(out.dtype.element_ty), mask=live)
