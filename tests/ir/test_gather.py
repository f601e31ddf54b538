"""Picking elements by index, and putting a number where an index says."""

from __future__ import annotations

import pytest
import torch

from infc.ir.errors import ProgramError
from infc.ir.ops import get_op
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
