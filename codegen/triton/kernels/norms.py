"""Norms over rows, alone or with the residual addition in front of them."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x,
    residual,
    w,
    out,
    total,
    eps,
    INNER: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out = x / sqrt(mean(x * x) + eps) * w in float32, of x + residual where ADD.

    Row r of x lies at (r // INNER) * OUTER_STRIDE + (r % INNER) * INNER_STRIDE; the others are
    dense. `total` takes the sum, rounded to its type first. With EARLY the normed value is rounded
    to x's type before the weight. Program r.
    """
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    place = (row // INNER).to(tl.int64) * OUTER_STRIDE + (row % INNER) * INNER_STRIDE
    dense = row.to(tl.int64) * WIDTH
    value = tl.load(x + place + at, mask=live, other=0.0)
    if ADD:
        other = tl.load(residual + dense + at, mask=live, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + dense + at, value, mask=live)
    wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / WIDTH
    normed = wide * (1.0 / tl.sqrt_rn(mean + eps))
    weight = tl.load(w + at, mask=live, other=0.0)
    if EARLY:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
        scaled = normed * weight.to(tl.float32)
        if x.dtype.element_ty == w.dtype.element_ty:
            scaled = scaled.to(x.dtype.element_ty).to(tl.float32)
    else:
        scaled = normed * weight.to(tl.float32)
    tl.store(out + dense + at, scaled.to(out.dtype.element_ty), mask=live)


@triton.jit
def layer_norm(
    x,
    residual,
    w,
    b,
    out,
    total,
    eps,
    INNER: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
):
    """out = (x - mean) / sqrt(variance + eps) * w + b in float32, as `rms_norm` otherwise."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    place = (row // INNER).to(tl.int64) * OUTER_STRIDE + (row % INNER) * INNER_STRIDE
    dense = row.to(tl.int64) * WIDTH
    value = tl.load(x + place + at, mask=live, other=0.0)
    if ADD:
        other = tl.load(residual + dense + at, mask=live, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + dense + at, value, mask=live)
    wide = value.to(tl.float32)
    mean = tl.sum(wide, 0) / WIDTH
    apart = tl.where(live, wide - mean, 0.0)
    variance = tl.sum(apart * apart, 0) / WIDTH
    scaled = apart * (1.0 / tl.sqrt_rn(variance + eps))
    scaled = scaled * tl.load(w + at, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        scaled += tl.load(b + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + dense + at, scaled.to(out.dtype.element_ty), mask=live)


@triton.jit
def softmax(x, out, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """exp(x - max) over its sum along each row, in float32. Program r."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    value = tl.load(x + row * STRIDE + at, mask=live, other=-float("inf")).to(tl.float32)
    share = tl.exp(value - tl.max(value, 0))
    share = tl.where(live, share, 0.0)
    result = share / tl.sum(share, 0)
    tl.store(out + row * WIDTH + at, result.to(out.dtype.element_ty), mask=live)
