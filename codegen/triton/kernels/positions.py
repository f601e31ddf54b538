"""Rotary positions, and keys and values on their way into the cache.

A layer's part of a page is K [G][block_size][D], then V [G][block_size][Dv]; a cache of codes goes
on with the scales of both as float32 [G][block_size] each. Codes are of int8, or e4m3 as unsigned
bytes. Pages lie PAGE elements apart.
"""

import triton
import triton.language as tl

from .e4m3 import e4m3_units, encoded
from .numbers import rint, turned_sine


@triton.jit
def rotary(
    positions,
    frequencies,
    out,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUARTERS: tl.constexpr,
):
    """out[t, i] = scale * sin(positions[t] * frequencies[i] + QUARTERS * pi / 2). Program t.

    The angle is rounded to float32, and so are the sine and the product.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    position = tl.load(positions + row).to(tl.float32)
    angle = position * tl.load(frequencies + at, mask=at < WIDTH, other=0.0)
    sine = turned_sine(angle.to(tl.float64), QUARTERS).to(tl.float32)
    tl.store(out + row * WIDTH + at, sine * scale, mask=at < WIDTH)


@triton.jit
def rope(
    x,
    cos,
    sin,
    out,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Pairs of the first ROTARY elements of a head turned by the angle of their token.

    Program (t, head).
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = x + row * STRIDE + head * D
    target = out + row * (HEADS * D) + head * D
    i = tl.arange(0, HALF_BLOCK)
    live = i < ROTARY // 2
    first = i * 2 if INTERLEAVED else i
    second = i * 2 + 1 if INTERLEAVED else i + ROTARY // 2
    a, b = _turned(source, cos, sin, row, i, live, first, second, ROTARY)
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(target + first, a.to(kind), mask=live)
    tl.store(target + second, b.to(kind), mask=live)
    if ROTARY < D:
        at = tl.arange(0, BLOCK)
        rest = (at >= ROTARY) & (at < D)
        tl.store(target + at, tl.load(source + at, mask=rest), mask=rest)


@triton.jit
def rope_kv_write(
    q,
    k,
    v,
    cos,
    sin,
    out,
    pages,
    scales,
    slots,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """`rope` of q into `out`; of k into its page, beside a copy of v.

    Program (t, head): q's HEADS first, then the G of k and v. A key is rounded to its own type,
    then to the cache's. A slot below 0 stores nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, HALF_BLOCK)
    live = i < ROTARY // 2
    first = i * 2 if INTERLEAVED else i
    second = i * 2 + 1 if INTERLEAVED else i + ROTARY // 2
    at = tl.arange(0, BLOCK)
    rest = (at >= ROTARY) & (at < D)
    if head < HEADS:
        source = q + row * Q_STRIDE + head * D
        target = out + row * (HEADS * D) + head * D
        a, b = _turned(source, cos, sin, row, i, live, first, second, ROTARY)
        tl.store(target + first, a.to(out.dtype.element_ty), mask=live)
        tl.store(target + second, b.to(out.dtype.element_ty), mask=live)
        if ROTARY < D:
            tl.store(target + at, tl.load(source + at, mask=rest), mask=rest)
    else:
        g = head - HEADS
        source = k + row * K_STRIDE + g * D
        a, b = _turned(source, cos, sin, row, i, live, first, second, ROTARY)
        one = a.to(k.dtype.element_ty).to(tl.float32)
        two = b.to(k.dtype.element_ty).to(tl.float32)
        slot = tl.load(slots + row).to(tl.int64)
        stored = slot >= 0
        page = slot // BLOCK_SIZE
        place = g * BLOCK_SIZE + slot % BLOCK_SIZE
        key = pages + page * PAGE + place * D
        value = tl.load(v + row * V_STRIDE + g * DV + at, mask=at < DV, other=0.0).to(tl.float32)
        other = tl.load(source + at, mask=rest, other=0.0).to(tl.float32)
        kind: tl.constexpr = pages.dtype.element_ty
        if kind.is_int():
            top = tl.maximum(_top(one, live), _top(two, live))
            top = tl.maximum(top, _top(other, rest))
            inverse, scale = _units(top, kind)
            cell = scales + page * (PAGE // 4) + place
            tl.store(cell, scale, mask=stored)
            one = _code(one, inverse, kind)
            two = _code(two, inverse, kind)
            other = _code(other, inverse, kind)
            inverse, scale = _units(_top(value, at < DV), kind)
            tl.store(cell + G * BLOCK_SIZE, scale, mask=stored)
            value = _code(value, inverse, kind)
        tl.store(key + first, one.to(kind), mask=live & stored)
        tl.store(key + second, two.to(kind), mask=live & stored)
        if ROTARY < D:
            tl.store(key + at, other.to(kind), mask=rest & stored)
        values = pages + page * PAGE + G * BLOCK_SIZE * D + place * DV
        tl.store(values + at, value.to(kind), mask=(at < DV) & stored)


@triton.jit
def kv_write(
    k,
    v,
    pages,
    scales,
    slots,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys and values into their pages. Program (t, head); a slot below 0 stores nothing."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    stored = slot >= 0
    page = slot // BLOCK_SIZE
    place = g * BLOCK_SIZE + slot % BLOCK_SIZE
    key = tl.load(k + row * K_STRIDE + g * D + at, mask=at < D, other=0.0).to(tl.float32)
    value = tl.load(v + row * V_STRIDE + g * DV + at, mask=at < DV, other=0.0).to(tl.float32)
    kind: tl.constexpr = pages.dtype.element_ty
    if kind.is_int():
        cell = scales + page * (PAGE // 4) + place
        inverse, scale = _units(_top(key, at < D), kind)
        tl.store(cell, scale, mask=stored)
        key = _code(key, inverse, kind)
        inverse, scale = _units(_top(value, at < DV), kind)
        tl.store(cell + G * BLOCK_SIZE, scale, mask=stored)
        value = _code(value, inverse, kind)
    keys = pages + page * PAGE + place * D
    values = pages + page * PAGE + G * BLOCK_SIZE * D + place * DV
    tl.store(keys + at, key.to(kind), mask=(at < D) & stored)
    tl.store(values + at, value.to(kind), mask=(at < DV) & stored)


@triton.jit
def _turned(source, cos, sin, row, i, live, first, second, ROTARY: tl.constexpr):
    c = tl.load(cos + row * (ROTARY // 2) + i, mask=live, other=0.0).to(tl.float32)
    s = tl.load(sin + row * (ROTARY // 2) + i, mask=live, other=0.0).to(tl.float32)
    a = tl.load(source + first, mask=live, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=live, other=0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def _top(x, live):
    """The largest magnitude by bits, where NaN is the largest."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(tl.where(live, bits, 0), 0)


@triton.jit
def _units(top, KIND: tl.constexpr):
    """What codes are multiplied by, and stand for, of a row whose largest magnitude has bits."""
    if KIND == tl.uint8:
        inverse, scale = e4m3_units(top)
    else:
        size = top.to(tl.float32, bitcast=True)
        used = (size < 1e-30) == 0
        inverse = tl.where(used, tl.div_rn(127.0, tl.where(used, size, 1.0)), 0.0)
        scale = tl.where(used, tl.div_rn(size, 127.0), 0.0)
    return inverse, scale


@triton.jit
def _code(x, inverse, KIND: tl.constexpr):
    if KIND == tl.uint8:
        return encoded(x * inverse)
    else:
        return tl.minimum(tl.maximum(rint(x * inverse), -127.0), 127.0)
