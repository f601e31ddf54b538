"""Triton's interpreter, mended where it computes something else than a GPU, or fails.

It computes with the bits of bfloat16 as if they were integers, rounds to bfloat16 by cutting off,
and cannot turn arrays of one element into numbers with numpy from 2.4 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle = interpreter.TensorHandle
_FLOATS = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
}
_BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def mend() -> None:
    """Change the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    plain = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_fneg")
    for name in (*plain, "create_rsqrt", "create_erf"):
        if hasattr(builder, name):
            setattr(builder, name, _widened(getattr(builder, name)))
    interpreter._convert_float = _converter(interpreter._convert_float)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_dot = _dot(builder.create_dot)
    interpreter._patch_lang_tensor = _with_numbers(interpreter._patch_lang_tensor)


def _convert(values: Any, source: Any, target: Any) -> Any:
    bits = np.ascontiguousarray(values).view(_BITS[values.dtype.itemsize])
    result = torch.from_numpy(bits.copy()).view(_FLOATS[source]).to(_FLOATS[target])
    words = result.view(getattr(torch, f"int{target.primitive_bitwidth}")).numpy()
    return words.view(_WORDS[target.primitive_bitwidth]).reshape(values.shape)


def _converter(before: Callable[..., Any]) -> Callable[..., Any]:
    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source in _FLOATS and target in _FLOATS:
            return _convert(values, source, target)
        return before(values, source, target, rounding)

    return convert


def _is_narrow(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    if not _is_narrow(handle):
        return handle
    return Handle(_convert(handle.data, tl.bfloat16, tl.float32).view(np.float32), tl.float32)


def _narrow(handle: Any) -> Any:
    data = handle.data.astype(np.float32)
    return Handle(_convert(data, tl.float32, tl.bfloat16), tl.bfloat16)


def _widened(before: Callable[..., Any]) -> Callable[..., Any]:
    """An operation in float32 where operands are bfloat16, rounded afterwards."""

    def operation(self: Any, *operands: Any, **more: Any) -> Any:
        if not any(map(_is_narrow, operands)):
            return before(self, *operands, **more)
        result = before(self, *map(_wide, operands), **more)
        is_number = isinstance(result, Handle) and result.data.dtype != np.bool_
        return _narrow(result) if is_number else result

    return operation


def _cast(before: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == tl.bfloat16 and not new.is_floating():
            return before(self, _wide(source), target)
        if new == tl.bfloat16 and not old.is_floating():
            return _narrow(Handle(source.data.astype(np.float32), tl.float32))
        if old in _FLOATS and new in _FLOATS and tl.bfloat16 in (old, new):
            data = _convert(source.data, old, new)
            return Handle(data.view(interpreter._get_np_dtype(target)), new)
        return before(self, source, target)

    return cast


def _dot(before: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        x, y = _wide(a), _wide(b)
        if x.data.dtype != np.float32 or d.data.dtype != np.float32:
            return before(self, x, y, d, *rest)
        # numpy's order of sums depends on where a row stands. In float64 it does not show: each
        # product is exact, and their sum is rounded once.
        sums = np.matmul(x.data.astype(np.float64), y.data.astype(np.float64)) + d.data
        return Handle(sums.astype(np.float32), d.dtype.scalar)

    return dot


def _with_numbers(before: Callable[..., Any]) -> Callable[..., Any]:
    def first(tensor: Any) -> Any:
        return np.asarray(tensor.handle.data).reshape(-1)

    def patch(kind: Any, *rest: Any) -> None:
        before(kind, *rest)
        kind.__index__ = kind.__int__ = lambda self: int(first(self)[0])
        kind.__bool__ = lambda self: first(self).size > 1 or bool(first(self)[0])

    return patch
