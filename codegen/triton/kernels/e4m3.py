"""Matrices of e4m3: rows rounded to it, products by its codes, and rows looked up as numbers.

`ir/e4m3.py` says what a byte stands for. Scales are those of rows, or with TILE of squares of so
many rows and columns of a matrix, and of so many elements of a row of activations.
"""

import triton
import triton.language as tl

from .numbers import activate, rint, rounded


@triton.jit
def quantize_e4m3(
    x,
    codes,
    scales,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes and a scale of each GROUP elements: scale = amax / 448, code that of x * (448 / amax).

    Program (r, group).
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    at = group * GROUP + i
    live = (i < GROUP) & (at < WIDTH)
    value = tl.load(x + row * STRIDE + at, mask=live, other=0.0).to(tl.float32)
    inverse, scale = e4m3_units(tl.max(tl.abs(value).to(tl.int32, bitcast=True), 0))
    code = encoded(value * inverse)
    tl.store(codes + row * WIDTH + at, code.to(codes.dtype.element_ty), mask=live)
    tl.store(scales + row * GROUPS + group, scale)


@triton.jit
def e4m3_linear(
    x,
    x_scale,
    codes,
    w_scale,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CODED: tl.constexpr,
    TILE: tl.constexpr,
    NATIVE: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BETWEEN: tl.constexpr,
):
    """out = x @ w.T + bias, where w is what codes and scales stand for, rounded once.

    With CODED, x are codes too, with scales; else numbers, which stay as they are. NATIVE says that
    tensor cores multiply e4m3; others multiply the same numbers in bfloat16. ACT, GATED and BETWEEN
    are those of `coded_linear`. Program (tile of N, tile of M).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    x_row = x + m.to(tl.int64) * x_stride
    acc = _product(
        x_row, x_scale, m, m < M, codes + n.to(tl.int64) * K,
        w_scale, n, n < N, K, BM, BN, BK, CODED, TILE, NATIVE,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        acc = activate(rounded(acc, BETWEEN), ACT)
    if GATED:
        up = _product(
            x_row, x_scale, m, m < M, codes + (n + N).to(tl.int64) * K,
            w_scale, n + N, n < N, K, BM, BN, BK, CODED, TILE, NATIVE,
        )  # fmt: skip
        if BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc *= rounded(up, BETWEEN)
    place = out + m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def expert_e4m3_linear(
    x,
    x_scale,
    codes,
    w_scale,
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
    CODED: tl.constexpr,
    TILE: tl.constexpr,
    NATIVE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """`e4m3_linear` of rows routes // SHARE by the matrix of their expert, as `expert_linear`."""
    expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        route = tl.load(routes + tl.program_id(1) * BM + tl.arange(0, BM))
        live = route >= 0
        m = route // SHARE
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        scales = w_scale + expert * N
        if TILE > 0:
            scales = w_scale + expert * (tl.cdiv(N, TILE) * tl.cdiv(K, TILE))
        acc = _product(
            x + m.to(tl.int64) * x_stride, x_scale, m, live, codes + (expert * N + n) * K,
            scales, n, n < N, K, BM, BN, BK, CODED, TILE, NATIVE,
        )  # fmt: skip
        if BIAS:
            line = bias + expert * N + n
            acc += tl.load(line, mask=n < N, other=0.0).to(tl.float32)[None, :]
        place = out + route[:, None].to(tl.int64) * N + n[None, :]
        mask = live[:, None] & (n[None, :] < N)
        tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def e4m3_rows(
    codes,
    w_scale,
    ids,
    out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """out[r, :] = the numbers that row ids[r] stands for. Program (r, columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < WIDTH
    token = tl.load(ids + row).to(tl.int64)
    value = _decoded(tl.load(codes + token * WIDTH + at, mask=live, other=0))
    if TILE > 0:
        across: tl.constexpr = (WIDTH + TILE - 1) // TILE
        unit = tl.load(w_scale + token // TILE * across + at // TILE, mask=live, other=0.0)
        value = value * unit
    else:
        value = value * tl.load(w_scale + token)
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _product(
    x_row,
    x_scale,
    m,
    live_m,
    line,
    w_scale,
    n,
    live_n,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CODED: tl.constexpr,
    TILE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Sums of BK products at a time, added in float32 in order of K, and scaled.

    Tensor cores keep fewer bits of longer sums of e4m3. BK divides TILE.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)
        a = tl.load(x_row[:, None] + k[None, :], mask=live_m[:, None] & (k[None, :] < K), other=0)
        b = tl.load(line[None, :] + k[:, None], mask=live_n[None, :] & (k[:, None] < K), other=0)
        if CODED and NATIVE:
            a = a.to(tl.float8e4nv, bitcast=True)
            part = tl.dot(a, b.to(tl.float8e4nv, bitcast=True))
        else:
            right = _decoded(b).to(tl.bfloat16)
            if CODED:
                part = tl.dot(_decoded(a).to(tl.bfloat16), right)
            elif x_row.dtype.element_ty == tl.bfloat16:
                part = tl.dot(a, right)
            else:
                wide = a.to(tl.float32)
                high = wide.to(tl.bfloat16)
                rest = wide - high.to(tl.float32)
                middle = rest.to(tl.bfloat16)
                low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
                part = tl.dot(low, right)
                part = tl.dot(middle, right, part)
                part = tl.dot(high, right, part)
        if TILE > 0:
            across = tl.cdiv(K, TILE)
            unit = tl.load(w_scale + n // TILE * across + at // TILE, mask=live_n, other=0.0)
            scale = unit[None, :]
            if CODED:
                mine = x_scale + m.to(tl.int64) * across + at // TILE
                scale = tl.load(mine, mask=live_m, other=0.0)[:, None] * scale
            acc += part * scale
        else:
            acc += part
    if TILE == 0:
        unit = tl.load(w_scale + n, mask=live_n, other=0.0)[None, :]
        if CODED:
            unit = tl.load(x_scale + m, mask=live_m, other=0.0)[:, None] * unit
        acc *= unit
    return acc


@triton.jit
def e4m3_units(top):
    """What is multiplied for codes, and what they stand for, by the bits of largest magnitudes."""
    size = top.to(tl.float32, bitcast=True)
    used = (size < 1e-30) == 0
    one = tl.where(used, size, 1.0)
    inverse = tl.where(used, tl.div_rn(one * 0 + 448.0, one), 0.0)
    return inverse, tl.where(used, tl.div_rn(size, one * 0 + 448.0), 0.0)


@triton.jit
def _decoded(code):
    """The float32 that bytes stand for: exponent and mantissa move to its bits, 2**120 too low."""
    bits = code.to(tl.int32) & 0xFF
    size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
    return tl.where(bits >= 0x80, -size, size)


@triton.jit
def levels(code):
    """The same where bytes of NaN need not be told from numbers."""
    bits = code.to(tl.int32)
    near = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return near.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def encoded(x):
    """The bytes of the nearest numbers, ties to the even mantissa; NaN stays NaN."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # What is cut off may carry into the exponent, which is then the next number as well.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = rint(tl.minimum(size, 1.0) * 512.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return code | tl.where(x.to(tl.int32, bitcast=True) < 0, 0x80, 0)
