"""Rows that are looked up, picked by index, widened for the host, or moved to a dense place."""

import triton
import triton.language as tl


@triton.jit
def pick_rows(x, index, out, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[r, :] = x[index[r], :], rounded to out's type; rows of x lie STRIDE apart.

    Program (r, columns).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row).to(tl.int64)
    value = tl.load(x + source * STRIDE + at, mask=at < WIDTH)
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def widen_rows(x, out, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[r, :] = x[r, :] in the type of out. Program (r, columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * STRIDE + at, mask=at < WIDTH)
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def copy_elements(
    x,
    out,
    size1,
    size2,
    size3,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride3,
    out_stride0,
    out_stride1,
    out_stride2,
    out_stride3,
    BLOCK: tl.constexpr,
):
    """out[i, j, k, l] = x[i, j, k, l], whatever their strides. Program (i, j, k; part of l)."""
    row = tl.program_id(0).to(tl.int64)
    i2 = row % size2
    i1 = row // size2 % size1
    i0 = row // size2 // size1
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = x + i0 * x_stride0 + i1 * x_stride1 + i2 * x_stride2 + at * x_stride3
    target = out + i0 * out_stride0 + i1 * out_stride1 + i2 * out_stride2 + at * out_stride3
    tl.store(target, tl.load(source, mask=at < size3), mask=at < size3)


@triton.jit
def gather_elements(x, index, out, STRIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """out[r, k] = x[r, index[r, k]] for k below COUNT. Program r."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    place = tl.load(index + row * COUNT + at, mask=at < COUNT, other=0).to(tl.int64)
    value = tl.load(x + row * STRIDE + place, mask=at < COUNT)
    tl.store(out + row * COUNT + at, value, mask=at < COUNT)


@triton.jit
def scatter_value(
    x,
    index,
    out,
    value,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """out[r, :] = x[r, :] with `value` at index[r, :COUNT]. Program r."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        moved = tl.load(x + row * STRIDE + at, mask=at < WIDTH)
        tl.store(out + row * WIDTH + at, moved, mask=at < WIDTH)
    tl.debug_barrier()
    at = tl.arange(0, FEW)
    place = tl.load(index + row * COUNT + at, mask=at < COUNT, other=0).to(tl.int64)
    one = tl.zeros((FEW,), tl.float32) + value
    tl.store(out + row * WIDTH + place, one.to(out.dtype.element_ty), mask=at < COUNT)


@triton.jit
def top_of_rows(
    x,
    values,
    indices,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The K largest of each row, descending, ties to the lower index; NaN is the largest.

    Program r.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * STRIDE + at, mask=at < WIDTH, other=0.0)
    wide = value.to(tl.float32)
    bits = wide.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(wide == 0.0, 0, order)
    order = tl.where(wide != wide, 0x7FFFFFFF, order)
    order = order.to(tl.int64)
    lowest = -2147483649
    order = tl.where(at < WIDTH, order, lowest)
    for k in range(0, K):
        top = tl.max(order, 0)
        place = tl.min(tl.where(order == top, at, BLOCK), 0)
        chosen = tl.load(x + row * STRIDE + place)
        tl.store(values + row * K + k, chosen)
        tl.store(indices + row * K + k, place.to(indices.dtype.element_ty))
        order = tl.where(at == place, lowest, order)


@triton.jit
def fill(out, count, value, BLOCK: tl.constexpr):
    """out[:count] = value."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one = tl.zeros((BLOCK,), tl.float32) + value
    tl.store(out + at, one.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def iota(out, count, BLOCK: tl.constexpr):
    """out[i] = i for i below `count`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, at.to(out.dtype.element_ty), mask=at < count)
