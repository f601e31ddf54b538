"""Codes and scales that are kept: made once while they fit, and never those of another matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from infc.ir.program import WeightExpr
from infc.ir.quantized_pairs import QuantizedPairs
from infc.ir.rounding import quantize_i4, quantize_i8
from infc.ir.weights import checkpoint, evaluate_expr

MATRICES = {name: torch.randn(4, 64) for name in "abc"}
ROUND = [(part, name) for name in MATRICES for part in ("codes", "scales")]

Load = Callable[[str], torch.Tensor]


def part_of(
    part: str, name: str, load: Load, pairs: QuantizedPairs, scheme: str = "int8-token"
) -> torch.Tensor:
    expr = WeightExpr(part, (checkpoint(name),), {"scheme": scheme})
    return evaluate_expr(expr, {"checkpoint": load}, pairs)


@pytest.fixture
def read() -> list[str]:
    """What was read of the checkpoint, in order."""
    return []


@pytest.fixture
def load(read: list[str]) -> Load:
    """Reads a matrix, and says so."""

    def one(name: str) -> torch.Tensor:
        read.append(name)
        return MATRICES[name]

    return one


@pytest.mark.parametrize(("fitting", "reads"), [(0, "abcabc"), (1, "abcbc"), (3, "abc")])
def test_what_fits_is_made_once(fitting: int, reads: str, read: list[str], load: Load) -> None:
    pairs = QuantizedPairs(max_bytes=fitting * (4 * 64 + 4 * 4))
    for part, name in ROUND * 2:
        expected = quantize_i8(MATRICES[name])[("codes", "scales").index(part)]
        assert torch.equal(part_of(part, name, load, pairs), expected)
    assert "".join(read) == reads


def test_schemes_and_readers_are_told_apart(load: Load) -> None:
    pairs = QuantizedPairs(max_bytes=1 << 20)
    int8, int4 = (
        part_of("codes", "a", load, pairs, scheme) for scheme in ("int8-token", "int4-token")
    )
    assert torch.equal(int8, quantize_i8(MATRICES["a"])[0])
    assert torch.equal(int4, quantize_i4(MATRICES["a"])[0])
    other = part_of("codes", "a", lambda name: MATRICES["b"], pairs)
    assert torch.equal(other, quantize_i8(MATRICES["b"])[0])


def test_kept_codes_stand_below_other_expressions(read: list[str], load: Load) -> None:
    pairs = QuantizedPairs(max_bytes=1 << 20)
    codes = WeightExpr("codes", (checkpoint("a"),), {"scheme": "int8-token"})
    rows = WeightExpr("slice", (codes,), {"dim": 0, "start": 1, "stop": 3})
    for _ in range(2):
        got = evaluate_expr(rows, {"checkpoint": load}, pairs)
        assert torch.equal(got, quantize_i8(MATRICES["a"])[0][1:3])
    assert read == ["a"]


def test_many_groups_are_coded_as_each_alone() -> None:
    """They are taken some at a time."""
    w = torch.randn(300, 1000)
    codes, scales = quantize_i4(w)
    for row in (0, 255, 256, 299):
        alone, scale = quantize_i4(w[row])
        assert torch.equal(codes[row], alone) and torch.equal(scales[row], scale)
