"""Products of rows by a matrix, and the gated activation behind one of them."""

import triton
import triton.language as tl

from .numbers import activate, rounded


@triton.jit
def linear(
    x,
    w,
    bias,
    residual,
    out,
    M,
    N,
    K,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    BETWEEN: tl.constexpr,
    ADDED: tl.constexpr,
):
    """out[M, N] = x[M, K] @ w[N, K].T + bias[N], accumulated in float32, rounded once.

    With ACT, it is rounded to the type BETWEEN, then goes through that activation. With ADDED, it
    is rounded to the type of that name, then residual[M, N] is added.

    Rows of x lie x_stride apart. They are rounded to w's type where that is narrower. K is reduced
    in ascending blocks of BK, in one order whatever M is. EVEN says that BK divides K. Program
    (tile of N, tile of M); GROUP tiles of M go through the tiles of N together.
    """
    columns = tl.num_programs(0)
    rows = tl.num_programs(1)
    tile = tl.program_id(1) * columns + tl.program_id(0)
    band = tile // (GROUP * columns)
    first = band * GROUP
    size = tl.minimum(rows - first, GROUP)
    tile_m = first + (tile % (GROUP * columns)) % size
    tile_n = (tile % (GROUP * columns)) // size
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = x + m[:, None].to(tl.int64) * x_stride + k[None, :]
    right = w + n[None, :].to(tl.int64) * K + k[:, None]
    live_m = m[:, None] < M
    live_n = n[None, :] < N
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        if EVEN:
            a = tl.load(left, mask=live_m, other=0.0)
            b = tl.load(right, mask=live_n, other=0.0)
        else:
            a = tl.load(left, mask=live_m & (k[None, :] < K - at), other=0.0)
            b = tl.load(right, mask=live_n & (k[:, None] < K - at), other=0.0)
        if w.dtype.element_ty == tl.float32:
            acc = tl.dot(a.to(tl.float32), b, acc, input_precision="ieee")
        else:
            acc = tl.dot(a.to(w.dtype.element_ty), b, acc)
        left += BK
        right += BK
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        acc = activate(rounded(acc, BETWEEN), ACT)
    place = m[:, None].to(tl.int64) * N + n[None, :]
    if ADDED != "":
        other = tl.load(residual + place, mask=live_m & live_n, other=0.0)
        acc = rounded(acc, ADDED) + other.to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=live_m & live_n)


@triton.jit
def linear_boxes(
    x,
    w,
    bias,
    out,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    BETWEEN: tl.constexpr,
):
    """`linear` of dense matrices by descriptors: the tensor memory accelerator copies their tiles.

    What lies outside of them is loaded as 0, and not stored. Each program computes tiles as far
    apart as there are programs, in the order of `linear`; the copies of one begin while the one
    before is stored. K is reduced in ascending blocks of BK, in one order whatever M is.
    """
    rows = tl.cdiv(M, BM)
    columns = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
        band = tile // (GROUP * columns)
        first = band * GROUP
        size = tl.minimum(rows - first, GROUP)
        m = (first + (tile % (GROUP * columns)) % size) * BM
        n = ((tile % (GROUP * columns)) // size) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc)
        if BIAS:
            at = n + tl.arange(0, BN)
            acc += tl.load(bias + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
        if ACT != "":
            acc = activate(rounded(acc, BETWEEN), ACT)
        out.store([m, n], acc.to(out.dtype))


@triton.jit
def linear_gated(
    x,
    w,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACT: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    BETWEEN: tl.constexpr,
):
    """out[M, N] = act(gate) * up, where w[2N, K] gives gate in its first N columns, then up.

    Both are rounded to the type BETWEEN, as `linear` and `gated_act` apart would. Program (tile of
    N, tile of M).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = x + m[:, None].to(tl.int64) * x_stride + k[None, :]
    right = w + n[None, :].to(tl.int64) * K + k[:, None]
    apart = tl.zeros((), tl.int64) + N
    live_m = m[:, None] < M
    live_n = n[None, :] < N
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        if EVEN:
            a = tl.load(left, mask=live_m, other=0.0)
            b = tl.load(right, mask=live_n, other=0.0)
            c = tl.load(right + apart * K, mask=live_n, other=0.0)
        else:
            a = tl.load(left, mask=live_m & (k[None, :] < K - at), other=0.0)
            deep = live_n & (k[:, None] < K - at)
            b = tl.load(right, mask=deep, other=0.0)
            c = tl.load(right + apart * K, mask=deep, other=0.0)
        if w.dtype.element_ty == tl.float32:
            gate = tl.dot(a.to(tl.float32), b, gate, input_precision="ieee")
            up = tl.dot(a.to(tl.float32), c, up, input_precision="ieee")
        else:
            gate = tl.dot(a.to(w.dtype.element_ty), b, gate)
            up = tl.dot(a.to(w.dtype.element_ty), c, up)
        left += BK
        right += BK
    if BIAS:
        gate += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = out + m[:, None].to(tl.int64) * N + n[None, :]
    value = activate(rounded(gate, BETWEEN), ACT) * rounded(up, BETWEEN)
    tl.store(place, value.to(out.dtype.element_ty), mask=live_m & live_n)


@triton.jit
def gated_act(
    x, out, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr
):
    """out[r, :] = act(x[r, :WIDTH]) * x[r, WIDTH:] in float32, rounded once.

    Program (r, columns).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < WIDTH
    gate = tl.load(x + row * STRIDE + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * STRIDE + WIDTH + at, mask=live, other=0.0).to(tl.float32)
    value = activate(gate, ACT) * up
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def matmul(
    a,
    b,
    out,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[i] = a[i] @ b[i] of dense matrices [M, K] and [K, N]. Program (tile N, tile M, i)."""
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        deep = at + k
        mask = (m[:, None] < M) & (deep[None, :] < K)
        left = tl.load(a + batch * M * K + m[:, None].to(tl.int64) * K + deep[None, :], mask, 0.0)
        mask = (deep[:, None] < K) & (n[None, :] < N)
        right = tl.load(b + batch * K * N + deep[:, None].to(tl.int64) * N + n[None, :], mask, 0.0)
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    place = out + batch * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
