"""Norms with what is behind them: products of few rows, and the codes of rows."""

import triton
import triton.language as tl

from .coded import code_units
from .e4m3 import e4m3_units, encoded
from .numbers import activate, rint, rounded


@triton.jit
def normed_linear(
    x,
    scale,
    w,
    bias,
    out,
    eps,
    M,
    N,
    K,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    NORMED: tl.constexpr,
    ACT: tl.constexpr,
    BETWEEN: tl.constexpr,
):
    """out[M, N] = norm(x)[M, K] @ w[N, K].T + bias[N]; act(gate) * up of it where ACT is given.

    The norm is that of `rms_norm`, rounded to the type NORMED; every block sums the squares of its
    rows in one order. With ACT, w has 2N rows, gate before up, and both are rounded to the type
    BETWEEN, as `linear_gated` does. Program (tile of N, tile of M).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live_m = m[:, None] < M
    live_n = n[None, :] < N
    left = x + m[:, None].to(tl.int64) * x_stride + k[None, :]
    squares = tl.zeros((BM, BK), tl.float32)
    for at in range(0, K, BK):
        inside = live_m if EVEN else live_m & (k[None, :] < K - at)
        wide = tl.load(left + at, mask=inside, other=0.0).to(tl.float32)
        squares += wide * wide
    mean = tl.sum(squares, 1) / K
    factor = (1.0 / tl.sqrt_rn(mean + eps))[:, None]
    right = w + n[None, :].to(tl.int64) * K + k[:, None]
    apart = tl.zeros((), tl.int64) + N
    acc = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        if EVEN:
            wide = tl.load(left + at, mask=live_m, other=0.0).to(tl.float32)
            weight = tl.load(scale + at + k)
            deep = live_n
        else:
            wide = tl.load(left + at, mask=live_m & (k[None, :] < K - at), other=0.0)
            wide = wide.to(tl.float32)
            weight = tl.load(scale + at + k, mask=k < K - at, other=0.0)
            deep = live_n & (k[:, None] < K - at)
        value = wide * factor
        if EARLY:
            value = value.to(x.dtype.element_ty).to(tl.float32)
        value = value * weight.to(tl.float32)[None, :]
        if EARLY and x.dtype.element_ty == scale.dtype.element_ty:
            value = value.to(x.dtype.element_ty).to(tl.float32)
        a = rounded(value, NORMED).to(w.dtype.element_ty)
        acc = _add_product(acc, a, tl.load(right, mask=deep, other=0.0))
        if ACT != "":
            up = _add_product(up, a, tl.load(right + apart * K, mask=deep, other=0.0))
        right += BK
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        if BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = activate(rounded(acc, BETWEEN), ACT) * rounded(up, BETWEEN)
    place = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=live_m & live_n)


@triton.jit
def _add_product(acc, a, b):
    if b.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def norm_codes(
    x,
    residual,
    w,
    total,
    codes,
    scales,
    eps,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    NORMED: tl.constexpr,
):
    """`rms_norm` of a row, rounded to the type NORMED, and its codes with a scale for each GROUP.

    Codes are of 8 bits, and of e4m3 where they are unsigned. GROUP divides BLOCK. Program r.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    value = tl.load(x + row * STRIDE + at, mask=live, other=0.0)
    if ADD:
        other = tl.load(residual + row * WIDTH + at, mask=live, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * WIDTH + at, value, mask=live)
    wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / WIDTH
    normed = wide * (1.0 / tl.sqrt_rn(mean + eps))
    weight = tl.load(w + at, mask=live, other=0.0)
    if EARLY:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    normed = normed * weight.to(tl.float32)
    if EARLY and x.dtype.element_ty == w.dtype.element_ty:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    normed = tl.reshape(rounded(normed, NORMED), (BLOCK // GROUP, GROUP))
    top = tl.max(tl.abs(normed).to(tl.int32, bitcast=True), 1)
    if codes.dtype.element_ty == tl.int8:
        inverse, scale = code_units(top)
        code = tl.minimum(tl.maximum(rint(normed * inverse[:, None]), -127.0), 127.0).to(tl.int8)
    else:
        inverse, scale = e4m3_units(top)
        code = encoded(normed * inverse[:, None]).to(codes.dtype.element_ty)
    tl.store(codes + row * WIDTH + at, tl.reshape(code, (BLOCK,)), mask=live)
    group = tl.arange(0, BLOCK // GROUP)
    groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    tl.store(scales + row * groups + group, scale, mask=group < groups)
