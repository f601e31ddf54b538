"""Steps as bytes, for an executor in another process: sizes and raw arrays, without pickle.

Layout, little-endian:

* `_PREFIX`: magic number, version, and the CRC-32 of everything after the prefix;
* `_SIZES`: flags, the number of KV groups, T, B, R, L and D (see `Step`), and the number of
  carried tokens;
* for each KV group the width of its block table and the number of its block copies;
* with adjustments `_ADJUSTED_SIZES`: the number of rows, entries of bias and of counts, masks, and
  words of a mask;
* with further inputs the number of bytes and the text of `[[name, dtype, shape], ..]` as JSON;
* padding to a multiple of 8 bytes, then the draws, which contain 8-byte numbers;
* the int32 arrays in the order of `Step`, one after the other, and the arrays of the adjustments
  and the further inputs, whose numbers have 4 bytes, too.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InfcError
from ..sampling.adjustments import ADJUSTED, Adjustments
from ..sampling.draws import DRAW
from .step import Array, Int32Array, Step

_MAGIC = b"infcstep"
_VERSION = 3
_PREFIX = struct.Struct("<8sII")
_SIZES = struct.Struct("<8I")
_GROUP = struct.Struct("<2I")
_ADJUSTED_SIZES = struct.Struct("<5I")
_ADJUSTED_INTS = ADJUSTED.itemsize // 4
_SOME_ROWS = 1  # flag: `logits_rows` is not None
_HIDDEN = 2  # flag: `wants_hidden`
_ADJUSTED = 4  # flag: `adjustments` is not None
_INPUTS = 8  # flag: `inputs` is not empty
_TEXT = struct.Struct("<I")

assert sys.byteorder == "little", "arrays are sent as they lie in memory"


def write_step(step: Step) -> bytes:
    """The step as bytes."""
    rows, adjusted = step.logits_rows, step.adjustments
    sizes = _SIZES.pack(
        (rows is not None) * _SOME_ROWS
        + step.wants_hidden * _HIDDEN
        + (adjusted is not None) * _ADJUSTED
        + bool(step.inputs) * _INPUTS,
        len(step.slots),
        len(step.token_ids),
        len(step.context_lengths),
        len(step.logits_index),
        0 if rows is None else len(rows),
        len(step.draws),
        len(step.carried),
    )
    groups = [
        _GROUP.pack(table.shape[1], len(copies))
        for table, copies in zip(step.block_tables, step.block_copies, strict=True)
    ]
    if adjusted is not None:
        groups.append(_adjusted_sizes(adjusted))
    if step.inputs:
        groups.append(_input_kinds(step.inputs))
    head = b"".join((sizes, *groups))
    body = b"".join(
        (
            head,
            bytes(-(_PREFIX.size + len(head)) % 8),
            step.draws.data,
            step.token_ids.data,
            step.positions.data,
            step.query_starts.data,
            step.context_lengths.data,
            *[array.data for array in (*step.block_tables, *step.slots, *step.block_copies)],
            step.logits_index.data,
            b"" if rows is None else rows.data,
            step.carried.data,
            *(() if adjusted is None else [array.data for array in _adjusted_arrays(adjusted)]),
            *[np.ascontiguousarray(array).data for array in step.inputs.values()],
        )
    )
    return _PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body


def read_step(data: bytes | bytearray | memoryview) -> Step:
    """The step that `write_step` wrote; its arrays are views of `data`.

    Raises InfcError for bytes that are not a whole, undamaged step of this version.
    """
    at = _PREFIX.size + _SIZES.size
    if len(data) < at:
        raise _damaged(f"{len(data)} bytes are too few")
    magic, version, checksum = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise _damaged("they begin with something else")
    if version != _VERSION:
        raise InfcError(
            f"these bytes are a step of version {version}, and this infc reads version {_VERSION}",
            hint="run the same infc in all processes",
        )
    if zlib.crc32(memoryview(data)[_PREFIX.size :]) != checksum:
        raise _damaged(f"the checksum of the {len(data)} bytes does not match")
    sizes = _SIZES.unpack_from(data, _PREFIX.size)
    flags, num_groups, tokens, sequences, num_rows, some_rows, num_draws, carried = sizes
    arrays = at + num_groups * _GROUP.size
    if len(data) < arrays:
        raise _damaged(f"{num_groups} KV groups do not fit into {len(data)} bytes")
    groups = [_GROUP.unpack_from(data, at + g * _GROUP.size) for g in range(num_groups)]
    adjusted = None
    if flags & _ADJUSTED:
        if len(data) < arrays + _ADJUSTED_SIZES.size:
            raise _damaged(f"sizes of adjustments do not fit into {len(data)} bytes")
        adjusted = _ADJUSTED_SIZES.unpack_from(data, arrays)
        arrays += _ADJUSTED_SIZES.size
    kinds: list[_Kind] = []
    if flags & _INPUTS:
        kinds, arrays = _read_kinds(data, arrays)
    at = arrays + -arrays % 8
    some_rows *= flags & _SOME_ROWS
    num_ints = 2 * tokens + 2 * sequences + 1 + num_rows + some_rows + 2 * carried
    num_ints += sum([sequences * width + tokens + 2 * copies for width, copies in groups])
    if adjusted is not None:
        entries, bias, counts, masks, words = adjusted
        num_ints += entries * _ADJUSTED_INTS + 2 * bias + 2 * counts + masks * words
    num_ints += sum([math.prod(shape) for _, _, shape in kinds])
    if len(data) != at + num_draws * DRAW.itemsize + 4 * num_ints:
        raise _damaged(f"arrays of the sizes that it names do not make {len(data)} bytes")
    draws = np.frombuffer(data, DRAW, num_draws, at)
    ints = _Ints(np.frombuffer(data, np.int32, offset=at + num_draws * DRAW.itemsize))
    return Step(
        token_ids=ints.take(tokens),
        positions=ints.take(tokens),
        query_starts=ints.take(sequences + 1),
        context_lengths=ints.take(sequences),
        block_tables=tuple(
            [ints.take(sequences * width).reshape(sequences, width) for width, _ in groups]
        ),
        slots=tuple([ints.take(tokens) for _ in groups]),
        block_copies=tuple([ints.take(2 * copies).reshape(copies, 2) for _, copies in groups]),
        logits_index=ints.take(num_rows),
        logits_rows=ints.take(some_rows) if flags & _SOME_ROWS else None,
        draws=draws,
        wants_hidden=bool(flags & _HIDDEN),
        carried=ints.take(2 * carried).reshape(carried, 2),
        adjustments=None if adjusted is None else _take_adjustments(ints, adjusted),
        inputs={
            name: _as(ints.take(math.prod(shape)), dtype).reshape(shape)
            for name, dtype, shape in kinds
        },
    )


_Kind = tuple[str, str, list[int]]
"""Name, element type and shape of a further input."""


def _as(numbers: Int32Array, dtype: str) -> Array:
    return numbers.view(np.float32) if dtype == "float32" else numbers


def _input_kinds(inputs: Mapping[str, Array]) -> bytes:
    kinds = [(name, array.dtype.name, array.shape) for name, array in inputs.items()]
    text = json.dumps(kinds).encode()
    return _TEXT.pack(len(text)) + text


def _read_kinds(data: bytes | bytearray | memoryview, at: int) -> tuple[list[_Kind], int]:
    """The further inputs whose text begins at `at`, and where it ends."""
    if len(data) < at + _TEXT.size:
        raise _damaged("the text of further inputs is missing")
    (length,) = _TEXT.unpack_from(data, at)
    begin = at + _TEXT.size
    try:
        kinds = json.loads(bytes(data[begin : begin + length]))
    except (ValueError, RecursionError) as error:
        raise _damaged(f"the text of further inputs is not one: {error}") from None
    if not (isinstance(kinds, list) and all(map(_is_kind, kinds))):
        raise _damaged("further inputs have impossible types")
    return kinds, begin + length


def _is_kind(kind: object) -> bool:
    match kind:
        case [str(), "float32" | "int32", list() as shape]:
            return all(type(size) is int and size >= 0 for size in shape)
    return False


def _adjusted_arrays(adjusted: Adjustments) -> tuple[NDArray[Any], ...]:
    a = adjusted
    return (a.rows, a.bias_ids, a.bias, a.count_ids, a.counts, a.masks)


def _adjusted_sizes(adjusted: Adjustments) -> bytes:
    a = adjusted
    return _ADJUSTED_SIZES.pack(len(a.rows), len(a.bias), len(a.counts), *a.masks.shape)


def _take_adjustments(ints: _Ints, sizes: tuple[int, ...]) -> Adjustments:
    rows, bias, counts, masks, words = sizes
    return Adjustments(
        rows=ints.take(rows * _ADJUSTED_INTS).view(ADJUSTED),
        bias_ids=ints.take(bias),
        bias=ints.take(bias).view(np.float32),
        count_ids=ints.take(counts),
        counts=ints.take(counts),
        masks=ints.take(masks * words).view(np.uint32).reshape(masks, words),
    )


class _Ints:
    """Takes one array after the other from the front."""

    __slots__ = ("_all", "_at")

    def __init__(self, all_of_them: Int32Array) -> None:
        self._all = all_of_them
        self._at = 0

    def take(self, count: int) -> Int32Array:
        """The next `count` numbers."""
        begin = self._at
        self._at = end = begin + count
        return self._all[begin:end]


def _damaged(reason: str) -> InfcError:
    return InfcError(f"these bytes are not a step: {reason}", hint="send the step again")
