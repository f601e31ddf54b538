"""Buffers against numpy: a view must address the very elements that numpy's view does."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from infc.codegen.cpp.buffers import Buffer, Home


def addressed(buffer: Buffer) -> np.ndarray:
    """The element numbers that the buffer reaches, in its shape."""
    total = np.asarray(buffer.offset)
    for axis, (size, stride) in enumerate(zip(buffer.shape, buffer.strides, strict=True)):
        places = np.arange(int(str(size))) * int(stride)
        total = total + places.reshape(-1, *[1] * (len(buffer.shape) - axis - 1))
    return total


shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


@st.composite
def views(draw: st.DrawFn) -> tuple[Buffer, np.ndarray]:
    """A dense buffer after random transposes and slices, beside numpy's idea of it."""
    shape = draw(shapes)
    array = np.arange(int(np.prod(shape))).reshape(shape)
    buffer = Buffer.dense(Home("arena", 0, array.size * 4), "float", shape)
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            perm = tuple(draw(st.permutations(range(array.ndim))))
            array, buffer = array.transpose(perm), buffer.transpose(perm)
        else:
            dim = draw(st.integers(0, array.ndim - 1))
            start = draw(st.integers(0, array.shape[dim] - 1))
            step = draw(st.integers(1, 2))
            array = array[(slice(None),) * dim + (slice(start, None, step),)]
            sliced = buffer.slice(dim, start, step, array.shape)
            assert sliced is not None, "integer strides can always be sliced"
            buffer = sliced
    return buffer, array


@given(views())
def test_views_address_what_numpy_does(pair: tuple[Buffer, np.ndarray]) -> None:
    buffer, array = pair
    assert np.array_equal(addressed(buffer), array)


@given(views(), st.data())
def test_reshape_is_right_or_refused(pair: tuple[Buffer, np.ndarray], data: st.DataObject) -> None:
    buffer, array = pair
    target: list[int] = []
    rest = array.size
    while rest > 1 and len(target) < 4:
        factor = data.draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
        target.append(factor)
        rest //= factor
    target.append(rest)
    view = buffer.reshape(tuple(target))
    if view is None:
        assert not buffer.is_dense, "a dense buffer takes any shape"
    else:
        assert np.array_equal(addressed(view), array.reshape(target))


@given(views())
def test_expand_repeats(pair: tuple[Buffer, np.ndarray]) -> None:
    buffer, array = pair
    shape = (3, *(5 if size == 1 else size for size in array.shape))
    assert np.array_equal(addressed(buffer.expand(shape)), np.broadcast_to(array, shape))


def test_heads_of_a_merged_projection_are_a_view() -> None:
    from infc.ir.types import Sym

    merged = Buffer.dense(Home("arena", 0, 0), "float", (Sym("T"), 1152))
    keys = merged.slice(1, 896, 1, (Sym("T"), 128))
    assert keys is not None
    heads = keys.reshape((Sym("T"), 2, 64))
    assert heads is not None and heads.strides == (1152, 64, 1) and heads.offset == 896
