"""Small Triton kernels, each for a few families of instructions."""

# Triton does not let the annotations of its functions be checked.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def product(
    x, w, y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[M, N] = x[M, K] @ w[N, K]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), TYPE)
    for j in range(0, K, BK):
        inside = (j + k) < K
        a = tl.load(
            x + m[:, None] * K + (j + k)[None, :],
            mask=(m[:, None] < M) & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            w + n[None, :] * K + (j + k)[:, None],
            mask=(n[None, :] < N) & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(a, b, sums, out_dtype=TYPE, input_precision="ieee" if EXACT else "tf32")
    tl.store(y + m[:, None] * N + n[None, :], sums, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def product_of_boxes(x, w, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """As `product`, with descriptors for all three, and bf16 results."""
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        sums = tl.dot(x.load([m, k]), w.load([n, k]).T, sums)
    y.store([m, n], sums.to(tl.bfloat16))


@triton.jit
def attention(q, k, v, y, L, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """One head, causal; the softmax goes over blocks of keys."""
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)
    d = tl.arange(0, D)
    queries = tl.load(q + i[:, None] * D + d[None, :], mask=i[:, None] < L, other=0.0)
    most = tl.full((BQ,), -float("inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    sums = tl.zeros((BQ, D), tl.float32)
    for start in range(0, tl.minimum(L, (tl.program_id(0) + 1) * BQ), BK):
        j = start + tl.arange(0, BK)
        keys = tl.load(k + j[None, :] * D + d[:, None], mask=j[None, :] < L, other=0.0)
        values = tl.load(v + j[:, None] * D + d[None, :], mask=j[:, None] < L, other=0.0)
        scores = tl.dot(queries, keys) * 0.125
        scores = tl.where((j[None, :] <= i[:, None]) & (j[None, :] < L), scores, -float("inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp(most - new)
        weights = tl.exp(scores - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(tl.bfloat16), values)
        most = new
    tl.store(y + i[:, None] * D + d[None, :], sums / total[:, None], mask=i[:, None] < L)


@triton.jit
def normalized(x, w, y, H: tl.constexpr, B: tl.constexpr):
    """The root mean square norm of rows, in bf16."""
    i = tl.arange(0, B)
    row = tl.program_id(0) * H
    values = tl.load(x + row + i, mask=i < H, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(values * values, 0) / H + 1e-6)
    weights = tl.load(w + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(y + row + i, (values * scale * weights).to(tl.bfloat16), mask=i < H)


@triton.jit
def scans(x, y, order, sorted_, n, B: tl.constexpr):
    """Sums so far, the greatest and its place, and the sorted row."""
    i = tl.arange(0, B)
    values = tl.load(x + i, mask=i < n, other=-float("inf"))
    tl.store(y + i, tl.cumsum(tl.where(i < n, values, 0.0), 0), mask=i < n)
    most, where = tl.max(values, 0, return_indices=True)
    tl.store(order, where)
    tl.store(order + 1, most.to(tl.int32, bitcast=True))
    tl.store(sorted_ + i, tl.sort(values))


@triton.jit
def counts(x, y, n, B: tl.constexpr):
    """A histogram of 64 bins, the greatest, a lock that one block gets, and an exchange."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    values = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(y + tl.arange(0, 64), tl.histogram(values & 63, 64, mask=i < n))
    tl.atomic_max(y + 64, tl.max(values, 0))
    tl.atomic_add(y + 65, (tl.atomic_cas(y + 66, 0, 7) == 0).to(tl.int32))
    tl.atomic_xchg(y + 67, 3)


@triton.jit
def functions(x, y, n, B: tl.constexpr):
    """Eight functions of each number, one after the other."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=1.0)
    tl.store(y + i, tl.exp(v), mask=i < n)
    tl.store(y + n + i, tl.log(tl.abs(v)), mask=i < n)
    tl.store(y + 2 * n + i, tl.math.rsqrt(tl.abs(v)), mask=i < n)
    tl.store(y + 3 * n + i, tl.erf(v), mask=i < n)
    tl.store(y + 4 * n + i, tl.floor(v), mask=i < n)
    tl.store(y + 5 * n + i, libdevice.rint(v), mask=i < n)
    tl.store(y + 6 * n + i, tl.div_rn(1.0, v), mask=i < n)
    tl.store(y + 7 * n + i, tl.fma(v, v, -v), mask=i < n)


@triton.jit
def wide_integers(x, y, n, B: tl.constexpr):
    """The upper half of a product of 64 bits, and a quotient and a remainder of signed ones."""
    i = tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=1)
    factor = tl.full((B,), 0xD2E7470EE14C6C93, tl.uint64)
    tl.store(
        y + i,
        tl.umulhi(v.to(tl.uint64, bitcast=True), factor).to(tl.int64, bitcast=True),
        mask=i < n,
    )
    tl.store(y + n + i, v // 1000003, mask=i < n)
    tl.store(y + 2 * n + i, v % 1000003, mask=i < n)


@triton.jit
def eight_bits(x, y, z, n, B: tl.constexpr):
    """float32 to e4m3 and back, and to bf16."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    small = tl.load(x + i, mask=i < n, other=0.0).to(tl.float8e4nv)
    tl.store(y + i, small, mask=i < n)
    tl.store(z + i, small.to(tl.bfloat16), mask=i < n)


@triton.jit
def four_bits(x, scales, y, n, B: tl.constexpr):
    """Two numbers of four bits a byte, times a scale of 32 of them, rounded to int8."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    byte = tl.load(x + i // 2, mask=i < n, other=0)
    value = ((byte >> ((i % 2) * 4).to(tl.uint8)) & 15).to(tl.int8) - 8
    scaled = value.to(tl.float32) * tl.load(scales + i // 32, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + i, tl.clamp(libdevice.rint(scaled), -127.0, 127.0).to(tl.int8), mask=i < n)


@triton.jit
def dependent_copy(x, y, n, B: tl.constexpr):
    """A copy that waits for the launch before it."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.extra.cuda.gdc_wait()
    values = tl.load(x + i, mask=i < n, other=0.0)
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(y + i, values + 1.0, mask=i < n)
