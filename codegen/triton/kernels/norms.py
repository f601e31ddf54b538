"""Norms over rows, alone or with the residual addition in front of them."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x,
    residual,
    w,
    post,
    out,
    total,
    eps,
    post_eps,
    INNER: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    POST: tl.constexpr,
):
    """out = x / sqrt(mean(x * x) + eps) * w in float32, of x + residual where ADD.

    Row r of x lies at (r // INNER) * OUTER_STRIDE + (r % INNER) * INNER_STRIDE; the others are
    dense. `total` takes the sum, rounded to its type first. With EARLY the normed value is rounded
    to x's type before the weight. With POST ("late", or "early" as EARLY), x is normed by `post`
    before all that. Program r.
    """
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    place = (row // INNER).to(tl.int64) * OUTER_STRIDE + (row % INNER) * INNER_STRIDE
    dense = row.to(tl.int64) * WIDTH
    value = tl.load(x + place + at, mask=live, other=0.0)
    if POST != "":
        value = root_mean_square(value, post, at, live, post_eps, WIDTH, POST == "early")
        value = value.to(x.dtype.element_ty)
    if ADD:
        other = tl.load(residual + dense + at, mask=live, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + dense + at, value, mask=live)
    scaled = root_mean_square(value, w, at, live, eps, WIDTH, EARLY)
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
    scaled = mean_and_deviation(value, w, b, at, live, eps, WIDTH, BIAS)
    tl.store(out + dense + at, scaled.to(out.dtype.element_ty), mask=live)


@triton.jit
def root_mean_square(value, w, at, live, eps, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """The row of `rms_norm` in float32."""
    wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / WIDTH
    normed = wide * (1.0 / tl.sqrt_rn(mean + eps))
    weight = tl.load(w + at, mask=live, other=0.0)
    if EARLY:
        normed = normed.to(value.dtype).to(tl.float32)
    normed = normed * weight.to(tl.float32)
    if EARLY and value.dtype == w.dtype.element_ty:
        normed = normed.to(value.dtype).to(tl.float32)
    return normed


@triton.jit
def mean_and_deviation(value, w, b, at, live, eps, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """The row of `layer_norm` in float32."""
    wide = value.to(tl.float32)
    mean = tl.sum(wide, 0) / WIDTH
    apart = tl.where(live, wide - mean, 0.0)
    variance = tl.sum(apart * apart, 0) / WIDTH
    scaled = apart * (1.0 / tl.sqrt_rn(variance + eps))
    scaled = scaled * tl.load(w + at, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        scaled += tl.load(b + at, mask=live, other=0.0).to(tl.float32)
    return scaled


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
