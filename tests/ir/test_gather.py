"""Picking elements by index, and putting a number where an index says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import ProgramError
from infc.ir.ops import get_op
from infc.ir.program import Attr
from infc.ir.schemes import SCHEMES
from infc.ir.types import DType, Sym, TensorType

T = Sym("T")


def f32(*shape: int | Sym) -> TensorType:
    return TensorType(DType.F32, shape)


def i64(*shape: int | Sym) -> TensorType:
    return TensorType(DType.I64, shape)


def test_each_row_picks_from_itself() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    index = torch.tensor([[2, 0], [1, 1]])
    picked = get_op("gather").meaning(x, index, dim=1)
    assert isinstance(picked, torch.Tensor)
    assert picked.tolist() == [[3.0, 1.0], [5.0, 5.0]]
    put = get_op("scatter").meaning(x, index, dim=1, value=-1.0)
    assert isinstance(put, torch.Tensor)
    assert put.tolist() == [[-1.0, 2.0, -1.0], [4.0, -1.0, 6.0]]


@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_tokens_may_not_pick_from_each_other(name: str) -> None:
    op, value = get_op(name), {"value": 1.0} if name == "scatter" else {}
    (kind,) = op.infer([f32(T, 8), i64(T, 2)], {"dim": 1, **value})
    assert kind == (f32(T, 2) if name == "gather" else f32(T, 8))
    assert op.mixes([f32(T, 8), i64(T, 2)], (kind,), {"dim": 1}, "T") is None
    assert op.mixes([f32(T, 8), i64(T, 8)], (kind,), {"dim": 0}, "T") is not None
    for index in (i64(4, 2), i64(T), f32(T, 2)):
        with pytest.raises(ProgramError, match=name):
            op.infer([f32(T, 8), index], {"dim": 1, **value})


@given(
    st.sampled_from(list(SCHEMES)),
    st.integers(1, 5),
    st.integers(1, 100),
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
def test_rows_of_a_table_of_codes_are_rows_of_what_it_stands_for(
    name: str, vocab: int, width: int, rows: list[int], seed: int
) -> None:
    matrix = torch.randn(vocab, width, generator=torch.Generator().manual_seed(seed))
    codes, scales = SCHEMES[name].quantize(matrix)
    ids = torch.tensor([[row % vocab for row in rows]])
    picked = get_op("scaled_embedding").meaning(
        codes, scales, ids, dtype="f32", scheme=name, width=width
    )
    whole = SCHEMES[name].weight.decode(codes, scales, width)
    assert isinstance(picked, torch.Tensor)
    assert torch.equal(picked, whole[ids])
    assert float((picked - matrix[ids]).abs().max()) <= SCHEMES[name].tolerance * float(
        matrix.abs().max()
    )


def table(name: str, vocab: int, width: int) -> list[TensorType]:
    form, plain = SCHEMES[name].weight, f32(vocab, width)
    return [form.code_type(plain), form.scale_type(plain), i64(T)]


@pytest.mark.parametrize("name", SCHEMES)
def test_only_the_codes_of_the_rows_picked_are_read(name: str) -> None:
    op, types = get_op("scaled_embedding"), table(name, 100, 70)
    attrs: dict[str, Attr] = {"dtype": "bf16", "scheme": name, "width": 70}
    assert op.infer(types, attrs) == (TensorType(DType.BF16, (T, 70)),)
    assert op.mixes(types, (f32(T, 70),), attrs, "T") is None
    cost = op.cost(types, attrs, {"T": 3})
    form = SCHEMES[name].weight
    row = -(-70 // form.group) * form.block_bytes + 4
    assert (cost.bytes_read, cost.bytes_written) == (3 * (row + 8), 3 * 70 * 2)


@pytest.mark.parametrize(
    ("place", "kind", "changed", "message"),
    [
        (0, TensorType(DType.I8, (100, 99)), {}, "table is i8"),
        (1, f32(99), {}, "table_scale is f32"),
        (2, f32(T), {}, "ids is f32"),
        (2, i64(T), {"width": 97}, "expected u8.100, 132. for 97 columns"),
        (2, i64(T), {"width": 0}, "width is 0"),
        (2, i64(T), {"dtype": "i32"}, "dtype is i32, expected floating point"),
        (2, i64(T), {"scheme": "int3"}, "scheme is"),
    ],
)
def test_a_table_that_does_not_fit_its_scheme_is_refused(
    place: int, kind: TensorType, changed: dict[str, int | str], message: str
) -> None:
    types = table("int8", 100, 96)
    types[place] = kind
    attrs: dict[str, Attr] = {"dtype": "f32", "scheme": "int8", "width": 96, **changed}
    with pytest.raises(ProgramError, match=message):
        get_op("scaled_embedding").infer(types, attrs)
