"""Norms with what is behind them: products of few rows, and the codes of rows; those of gates."""

import triton
import triton.language as tl

from .coded import code_units
from .e4m3 import e4m3_units, encoded
from .norms import mean_and_deviation, root_mean_square
from .numbers import activate, rint, rounded


@triton.jit
def normed_linear(
    x,
    scale,
    shift,
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
    LAYER: tl.constexpr,
    SHIFT: tl.constexpr,
    NORMED: tl.constexpr,
    ACT: tl.constexpr,
    BETWEEN: tl.constexpr,
    GATED: tl.constexpr,
):
    """out[M, N] = norm(x)[M, K] @ w[N, K].T + bias[N], which goes through ACT as in `linear`.

    The norm is that of `rms_norm`, or with LAYER of `layer_norm`, where SHIFT says that its weight
    has a bias. It is rounded to the type NORMED; every block sums its rows in one order. With
    GATED, w has 2N rows, gate before up, as in `linear_gated`. Program (tile of N, tile of M).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live_m = m[:, None] < M
    live_n = n[None, :] < N
    left = x + m[:, None].to(tl.int64) * x_stride + k[None, :]
    mean = tl.zeros((BM, 1), tl.float32)
    if LAYER:
        sums = tl.zeros((BM, BK), tl.float32)
        for at in range(0, K, BK):
            inside = live_m if EVEN else live_m & (k[None, :] < K - at)
            sums += tl.load(left + at, mask=inside, other=0.0).to(tl.float32)
        mean += (tl.sum(sums, 1) / K)[:, None]
    squares = tl.zeros((BM, BK), tl.float32)
    for at in range(0, K, BK):
        inside = live_m if EVEN else live_m & (k[None, :] < K - at)
        wide = tl.load(left + at, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            wide = tl.where(inside, wide - mean, 0.0)
        squares += wide * wide
    factor = (1.0 / tl.sqrt_rn(tl.sum(squares, 1) / K + eps))[:, None]
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
        if LAYER:
            wide -= mean
        value = wide * factor
        if EARLY:
            value = value.to(x.dtype.element_ty).to(tl.float32)
        value = value * weight.to(tl.float32)[None, :]
        if EARLY and x.dtype.element_ty == scale.dtype.element_ty:
            value = value.to(x.dtype.element_ty).to(tl.float32)
        if SHIFT:
            added = tl.load(shift + at + k, mask=k < K - at, other=0.0)
            value += added.to(tl.float32)[None, :]
        a = rounded(value, NORMED).to(w.dtype.element_ty)
        acc = _add_product(acc, a, tl.load(right, mask=deep, other=0.0))
        if GATED:
            up = _add_product(up, a, tl.load(right + apart * K, mask=deep, other=0.0))
        right += BK
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        acc = activate(rounded(acc, BETWEEN), ACT)
    if GATED:
        if BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc *= rounded(up, BETWEEN)
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
    b,
    post,
    total,
    codes,
    scales,
    eps,
    post_eps,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    POST: tl.constexpr,
    LAYER: tl.constexpr,
    BIAS: tl.constexpr,
    NORMED: tl.constexpr,
):
    """`rms_norm` of a row, or with LAYER `layer_norm`, rounded to the type NORMED, and its codes.

    There is a scale for each GROUP, which divides BLOCK. Program r.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    value = tl.load(x + row * STRIDE + at, mask=live, other=0.0)
    if POST != "":
        value = root_mean_square(value, post, at, live, post_eps, WIDTH, POST == "early")
        value = value.to(x.dtype.element_ty)
    if ADD:
        other = tl.load(residual + row * WIDTH + at, mask=live, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * WIDTH + at, value, mask=live)
    if LAYER:
        normed = mean_and_deviation(value, w, b, at, live, eps, WIDTH, BIAS)
    else:
        normed = root_mean_square(value, w, at, live, eps, WIDTH, EARLY)
    _store_codes(rounded(normed, NORMED), row, 0, codes, scales, WIDTH, BLOCK, GROUP)


@triton.jit
def gated_codes(
    x,
    codes,
    scales,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
):
    """`gated_act` of a row, rounded to the type GATED, and its codes as those of `norm_codes`.

    Program (r, BLOCK elements of it).
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    live = at < WIDTH
    gate = tl.load(x + row * STRIDE + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * STRIDE + WIDTH + at, mask=live, other=0.0).to(tl.float32)
    value = rounded(activate(gate, ACT) * up, GATED)
    _store_codes(value, row, first, codes, scales, WIDTH, BLOCK, GROUP)


@triton.jit
def _store_codes(
    value,
    row,
    first,
    codes,
    scales,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Codes of BLOCK elements of a row from `first` on, which GROUP divides.

    They are of 8 bits, and of e4m3 where they are unsigned.
    """
    at = first + tl.arange(0, BLOCK)
    value = tl.reshape(value, (BLOCK // GROUP, GROUP))
    top = tl.max(tl.abs(value).to(tl.int32, bitcast=True), 1)
    if codes.dtype.element_ty == tl.int8:
        inverse, scale = code_units(top)
        code = tl.minimum(tl.maximum(rint(value * inverse[:, None]), -127.0), 127.0).to(tl.int8)
    else:
        inverse, scale = e4m3_units(top)
        code = encoded(value * inverse[:, None]).to(codes.dtype.element_ty)
    tl.store(codes + row * WIDTH + at, tl.reshape(code, (BLOCK,)), mask=at < WIDTH)
    group = first // GROUP + tl.arange(0, BLOCK // GROUP)
    groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    tl.store(scales + row * groups + group, scale, mask=group < groups)
