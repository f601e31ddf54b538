"""A step goes through bytes and back; what is not a step is refused."""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from infc.ir.errors import InfcError
from infc.runtime.sampling.adjustments import ADJUSTED, Adjustments
from infc.runtime.sampling.draws import DRAW
from infc.runtime.scheduling.step import Step
from infc.runtime.scheduling.step_bytes import _PREFIX, _VERSION, read_step, write_step


def ints(*shape: int) -> st.SearchStrategy[Any]:
    return arrays.arrays(np.int32, shape)


FURTHER: st.SearchStrategy[Any] = st.lists(st.integers(0, 4), max_size=3).flatmap(
    lambda shape: st.sampled_from([np.float32, np.int32]).flatmap(
        lambda kind: arrays.arrays(kind, tuple(shape))
    )
)


@st.composite
def adjustments(draw: st.DrawFn) -> Adjustments:
    size = st.integers(0, 4)
    rows, bias, counts, masks, words = (draw(size) for _ in range(5))
    return Adjustments(
        rows=np.frombuffer(draw(arrays.arrays(np.uint8, rows * ADJUSTED.itemsize)), ADJUSTED),
        bias_ids=draw(ints(bias)),
        bias=draw(arrays.arrays(np.float32, bias)),
        count_ids=draw(ints(counts)),
        counts=draw(ints(counts)),
        masks=draw(arrays.arrays(np.uint32, (masks, words))),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Arrays of any sizes that fit together; nothing depends on what is in them."""
    size = st.integers(0, 4)
    tokens, sequences, rows, wanted, draws = (draw(size) for _ in range(5))
    widths = draw(st.lists(size, max_size=3))
    return Step(
        token_ids=draw(ints(tokens)),
        positions=draw(ints(tokens)),
        query_starts=draw(ints(sequences + 1)),
        context_lengths=draw(ints(sequences)),
        block_tables=tuple(draw(ints(sequences, width)) for width in widths),
        slots=tuple(draw(ints(tokens)) for _ in widths),
        block_copies=tuple(draw(ints(draw(size), 2)) for _ in widths),
        logits_index=draw(ints(rows)),
        logits_rows=draw(st.none() | ints(wanted)),
        draws=np.frombuffer(draw(arrays.arrays(np.uint8, draws * DRAW.itemsize)), DRAW),
        adjustments=draw(st.none() | adjustments()),
        wants_hidden=draw(st.booleans()),
        carried=draw(ints(draw(size), 2)),
        inputs=draw(st.dictionaries(st.text(max_size=4), FURTHER, max_size=2)),
    )


def assert_same(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
        assert other.flags.c_contiguous and other.flags.aligned
    elif is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple) and isinstance(other, tuple):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    else:
        assert one == other


@given(steps())
def test_a_step_comes_back_equal(step: Step) -> None:
    assert_same(step, read_step(write_step(step)))


@given(steps(), st.data())
def test_damaged_bytes_are_refused(step: Step, data: st.DataObject) -> None:
    """Whatever is changed, missing or added."""
    whole = write_step(step)
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    for damaged in (changed, whole[:place], whole + bytes(place + 1)):
        with pytest.raises(InfcError, match=r"these bytes are (not a step|a step of version)"):
            read_step(damaged)


@given(steps(), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_sizes_that_do_not_make_the_bytes_are_refused(step: Step, place: int, size: int) -> None:
    """Also under the right checksum: nothing is sliced by them."""
    changed = bytearray(write_step(step))
    at = _PREFIX.size + 4 * place
    assume(place > 0 and int.from_bytes(changed[at : at + 4], "little") != size)
    changed[at : at + 4] = size.to_bytes(4, "little")
    body = changed[_PREFIX.size :]
    changed[: _PREFIX.size] = _PREFIX.pack(b"infcstep", _VERSION, zlib.crc32(body))
    with contextlib.suppress(InfcError):  # and nothing else
        # Sizes whose arrays take the same bytes, or of an array that the flags leave out.
        assert len(write_step(read_step(changed))) == len(changed)


STEP = Step(
    token_ids=np.zeros(1, np.int32),
    positions=np.zeros(1, np.int32),
    query_starts=np.array([0, 1], np.int32),
    context_lengths=np.ones(1, np.int32),
    block_tables=(),
    slots=(),
    block_copies=(),
    logits_index=np.zeros(0, np.int32),
)


@pytest.mark.parametrize(
    "text",
    [
        *(b"[[", b"\xff", b"3", b"[3]", b'[["x", "float32"]]', b'[[1, "float32", []]]'),
        *(b'[["x", "float64", [1]]]', b'[["x", "float32", [-1, -1]]]', b'[["x", "int32", [true]]]'),
        b"[" * 3000 + b"]" * 3000,
    ],
)
def test_text_of_inputs_that_is_none_is_refused(text: bytes) -> None:
    """Also under the right checksum."""
    whole = write_step(replace(STEP, inputs={"x": np.zeros(0, np.float32)}))
    told = b'[["x", "float32", [0]]]'
    assert whole.count(told) == 1
    at = whole.index(told)
    sized = len(text).to_bytes(4, "little")
    body = whole[_PREFIX.size : at - 4] + sized + text + whole[at + len(told) :]
    changed = _PREFIX.pack(b"infcstep", _VERSION, zlib.crc32(body)) + body
    with pytest.raises(InfcError, match=r"these bytes are not a step: .*further inputs"):
        read_step(changed)


def test_another_version_says_so() -> None:
    data = bytearray(write_step(STEP))
    data[8] += 1
    with pytest.raises(InfcError, match=r"version 4, and this infc reads version 3"):
        read_step(data)
