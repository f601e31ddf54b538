"""Matrices of codes: rows quantized to 8 bits, products by codes, and rows looked up as numbers.

`ir/formats.py` says how a row of codes lies. LEVELS is "plain" (8 bits), "centered", "counted" or
"book"; SCALE is "none", "i8" or "f16"; GROUP weights are a block of BLOCK_BYTES, whose codes begin
at byte CODES. `codes` and `halves` are one address, as bytes and as float16.
"""

import triton
import triton.language as tl

from .numbers import activate, rint, rounded

CHUNK = tl.constexpr(32)


@triton.jit
def quantize_rows(x, codes, scales, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Codes and one scale of each row: scale = amax / 127, code = rint(x * (127 / amax)).

    Program r.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * STRIDE + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    inverse, scale = code_units(tl.max(tl.abs(value).to(tl.int32, bitcast=True), 0))
    code = tl.minimum(tl.maximum(rint(value * inverse), -127.0), 127.0)
    tl.store(codes + row * WIDTH + at, code.to(tl.int8), mask=at < WIDTH)
    tl.store(scales + row, scale)


@triton.jit
def quantize_groups(
    x,
    codes,
    scales,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
):
    """As `quantize_rows` for each 32 elements of a row. Program (r, PART groups of it)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * PART + tl.arange(0, PART)
    at = group[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    value = tl.load(x + row * STRIDE + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    inverse, scale = code_units(tl.max(tl.abs(value).to(tl.int32, bitcast=True), 1))
    code = tl.minimum(tl.maximum(rint(value * inverse[:, None]), -127.0), 127.0)
    tl.store(codes + row * WIDTH + at, code.to(tl.int8), mask=at < WIDTH)
    tl.store(scales + row * GROUPS + group, scale, mask=group < GROUPS)


@triton.jit
def code_units(top):
    """What is multiplied for codes, and what they stand for, by the bits of largest magnitudes."""
    size = top.to(tl.float32, bitcast=True)
    used = (size < 1e-30) == 0
    one = tl.where(used, size, 1.0)
    inverse = tl.where(used, tl.div_rn(one * 0 + 127.0, one), 0.0)
    scale = tl.where(used, tl.div_rn(size, one * 0 + 127.0), 0.0)
    # A NaN shows in the scale.
    return tl.where(size == size, inverse, 0.0), tl.where(size == size, scale, size)


@triton.jit
def coded_linear(
    x,
    x_scale,
    codes,
    halves,
    w_scale,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    ROW_BYTES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    MINIMUM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BETWEEN: tl.constexpr,
):
    """out = x @ w.T * w_scale + bias, where w is what codes stand for, rounded once.

    ROWS says what x is: "exact" and "groups" are codes, with a scale of each row or of each 32
    elements; "float" are numbers, which stay as they are. With ACT, it is rounded to the type
    BETWEEN, then goes through that activation; with GATED, w has 2N rows, gate before up, and
    out = act(gate) * up. Program (tile of N, tile of M).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    x_row = x + m.to(tl.int64) * x_stride
    acc = _scaled_product(
        x_row, x_scale, m, m < M, codes, halves, w_scale, bias, n, n < N, K,
        ROW_BYTES, BM, BN, BK, ROWS, BITS, LEVELS, SCALE, MINIMUM, GROUP, BLOCK_BYTES, CODES, BIAS,
    )  # fmt: skip
    if ACT != "":
        acc = activate(rounded(acc, BETWEEN), ACT)
    if GATED:
        up = _scaled_product(
            x_row, x_scale, m, m < M, codes, halves, w_scale, bias, n + N, n < N, K, ROW_BYTES,
            BM, BN, BK, ROWS, BITS, LEVELS, SCALE, MINIMUM, GROUP, BLOCK_BYTES, CODES, BIAS,
        )  # fmt: skip
        acc *= rounded(up, BETWEEN)
    place = out + m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def expert_coded_linear(
    x,
    x_scale,
    codes,
    halves,
    w_scale,
    bias,
    out,
    routes,
    tile_experts,
    N,
    K,
    x_stride,
    SHARE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    MINIMUM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """`coded_linear` of rows routes // SHARE by the matrix of their expert, as `expert_linear`."""
    expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        route = tl.load(routes + tl.program_id(1) * BM + tl.arange(0, BM))
        live = route >= 0
        m = route // SHARE
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        row = expert * N + n
        acc = _scaled_product(
            x + m.to(tl.int64) * x_stride, x_scale, m, live, codes, halves, w_scale, bias, row,
            n < N, K, ROW_BYTES, BM, BN, BK, ROWS, BITS, LEVELS, SCALE, MINIMUM, GROUP,
            BLOCK_BYTES, CODES, BIAS,
        )  # fmt: skip
        place = out + route[:, None].to(tl.int64) * N + n[None, :]
        mask = live[:, None] & (n[None, :] < N)
        tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def coded_rows(
    codes,
    halves,
    w_scale,
    ids,
    out,
    ROW_BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    MINIMUM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES: tl.constexpr,
):
    """out[r, :] = the numbers that row ids[r] stands for. Program (r, columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < WIDTH
    token = tl.load(ids + row).to(tl.int64)
    line = codes + token * ROW_BYTES
    half_line = halves + token * (ROW_BYTES // 2)
    value = _levels(line, at, live, BITS, LEVELS, GROUP, BLOCK_BYTES, CODES)
    if SCALE != "none":
        value *= _scales(line, half_line, at, live, SCALE, GROUP, BLOCK_BYTES)
    if MINIMUM:
        value += tl.load(half_line + at // GROUP * (BLOCK_BYTES // 2) + 1, mask=live, other=0.0).to(
            tl.float32
        )
    value *= tl.load(w_scale + token)
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _scaled_product(
    x_row,
    x_scale,
    m,
    live_m,
    codes,
    halves,
    w_scale,
    bias,
    row,
    live_n,
    K,
    ROW_BYTES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    MINIMUM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The product by rows `row` of codes, with their scales and bias."""
    acc = _product(
        x_row, x_scale, m, live_m, codes + row.to(tl.int64) * ROW_BYTES,
        halves + row.to(tl.int64) * (ROW_BYTES // 2), live_n, K,
        BM, BN, BK, ROWS, BITS, LEVELS, SCALE, MINIMUM, GROUP, BLOCK_BYTES, CODES,
    )  # fmt: skip
    unit = tl.load(w_scale + row, mask=live_n, other=0.0)
    if ROWS == "exact":
        acc *= tl.load(x_scale + m, mask=live_m, other=0.0)[:, None] * unit[None, :]
    else:
        acc *= unit[None, :]
    if BIAS:
        acc += tl.load(bias + row, mask=live_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _product(
    x_row,
    x_scale,
    m,
    live_m,
    line,
    half_line,
    live_n,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    MINIMUM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES: tl.constexpr,
):
    """Sums before the scales of rows: integers where all is exact, else float32 in order of K.

    Codes and levels are whole numbers below 2**8, which bfloat16 holds, so tensor cores sum their
    products exactly. A float32 is the sum of three bfloat16.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM, BN), tl.int32)
    groups = tl.cdiv(K, CHUNK)
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)
        mask = live_m[:, None] & (k[None, :] < K)
        a = tl.load(x_row[:, None] + k[None, :], mask=mask, other=0)
        mask = live_n[None, :] & (k[:, None] < K)
        level = _levels(
            line[None, :], k[:, None], mask, BITS, LEVELS, GROUP, BLOCK_BYTES, CODES
        )  # fmt: skip
        if ROWS == "exact":
            if SCALE == "i8":
                level *= _scales(
                    line[None, :], half_line[None, :], k[:, None], mask, SCALE, GROUP, BLOCK_BYTES
                )  # fmt: skip
            total += tl.dot(a.to(tl.bfloat16), level.to(tl.bfloat16)).to(tl.int32)
        else:
            b = level.to(tl.bfloat16)
            if ROWS == "groups" or x_row.dtype.element_ty == tl.bfloat16:
                part = tl.dot(a.to(tl.bfloat16), b)
            else:
                wide = a.to(tl.float32)
                high = wide.to(tl.bfloat16)
                rest = wide - high.to(tl.float32)
                middle = rest.to(tl.bfloat16)
                low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
                part = tl.dot(low, b)
                part = tl.dot(middle, b, part)
                part = tl.dot(high, b, part)
            unit = _scales(line, half_line, at, live_n, SCALE, GROUP, BLOCK_BYTES)[None, :]
            if ROWS == "groups":
                mine = tl.load(
                    x_scale + m.to(tl.int64) * groups + at // CHUNK, mask=live_m, other=0.0
                )
                acc += part * (mine[:, None] * unit)
            else:
                acc += part * unit
            if MINIMUM:
                least = half_line + at // GROUP * (BLOCK_BYTES // 2) + 1
                least = tl.load(least, mask=live_n, other=0.0).to(tl.float32)
                whole = tl.sum(a.to(tl.float32), 1)
                if ROWS == "groups":
                    whole = mine * whole
                acc += least[None, :] * whole[:, None]
    if ROWS == "exact":
        return total.to(tl.float32)
    else:
        return acc


@triton.jit
def _levels(
    line,
    k,
    mask,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES: tl.constexpr,
):
    """The levels of elements k of rows of codes, in float32."""
    if BITS == 8:
        place = k // GROUP * BLOCK_BYTES + CODES + k % GROUP
        code = tl.load(line + place, mask=mask, other=0)
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        place = k // GROUP * BLOCK_BYTES + CODES + k % GROUP // CHUNK * 16 + k % 16
        code = tl.load(line + place, mask=mask, other=0).to(tl.int32) & 0xFF
        code = (code >> (k % CHUNK // 16 * 4)) & 15
        if LEVELS == "centered":
            return (code - 8).to(tl.float32)
        elif LEVELS == "counted":
            return code.to(tl.float32)
        else:
            # The levels plus 64, a byte each, from the lowest on.
            low = tl.full((), 0x3B352F28_20170C01, tl.int64)
            high = tl.full((), 0x786C625A_534C4640, tl.int64)
            word = tl.where(code < 8, low, high)
            return (((word >> ((code & 7) * 8).to(tl.int64)) & 0xFF).to(tl.int32) - 64).to(
                tl.float32
            )


@triton.jit
def _scales(
    line, half_line, k, mask, SCALE: tl.constexpr, GROUP: tl.constexpr, BLOCK_BYTES: tl.constexpr
):
    """The scales of the groups that elements k of rows are in, in float32."""
    if SCALE == "i8":
        code = tl.load(line + k // GROUP * BLOCK_BYTES, mask=mask, other=0)
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        place = half_line + k // GROUP * (BLOCK_BYTES // 2)
        return tl.load(place, mask=mask, other=0.0).to(tl.float32)
