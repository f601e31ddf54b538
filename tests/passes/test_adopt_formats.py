"""Adopted matrices are bit for bit what they were, whatever was done to their rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import PassError, UsageError
from infc.ir.formats import GGUF_FORMATS
from infc.ir.program import ModelSpec, Program, WeightExpr
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify
from infc.ir.weights import checkpoint, evaluate_expr, infer_weight
from infc.passes.adopt_formats import AdoptFormats
from infc.passes.base import PassContext, PassResult
from infc.passes.quantize_weights import QuantizeWeights
from infc.passes.samples import with_random_weights
from infc.passes.verification import Verifier

FORMATS = sorted(GGUF_FORMATS)


def leaf(name: str, rows: int, depth: int, stored: str | None) -> WeightExpr:
    return checkpoint(name, TensorType(DType.F32, (rows, depth)), stored)


def product(*exprs: WeightExpr, table: bool = False) -> Program:
    """Products of rows by these matrices, one after the other; with a table of the first."""
    b = ProgramBuilder("model", ModelSpec("model", 1, 32, 1, 1, 32, 50, 64))
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    kinds = [infer_weight(expr) for expr in exprs]
    names = [f"w{i}.weight" for i in range(len(exprs))]
    refs = [b.weight(n, k, e) for n, k, e in zip(names, kinds, exprs, strict=True) if k is not None]
    depth = b.operand_type(refs[0]).shape[-1]  # type: ignore[union-attr]
    x = b.emit("embedding", refs[0], ids) if table else None
    if x is None:
        x = b.input("x", TensorType(DType.F32, (Sym("T"), depth)))
    for ref in refs:
        b.output(b.emit("linear", x, ref))
    return with_random_weights(b.build())


def adopt(program: Program, **options: Any) -> PassResult:
    lines: list[str] = []
    context = PassContext(log=lines.append)
    result = AdoptFormats(**{"scheme": "adopt", **options}).run(program, context)
    verify(result.program)
    return result


@st.composite
def row_expressions(draw: st.DrawFn, stored: str) -> WeightExpr:
    """Anything that leaves rows whole: cut, permuted, stacked, rounded to where nothing is lost."""
    depth = 32 * draw(st.integers(1, 3))
    count = draw(st.integers(1, 3))
    parts = []
    for i in range(count):
        rows = 12 * draw(st.integers(1, 2))
        expr = leaf(f"t{i}", rows, depth, stored)
        steps = draw(st.lists(st.sampled_from(["halves", "slice", "cast"]), max_size=3))
        for step in steps:
            rows = int(str(infer_weight(expr).shape[0]))  # type: ignore[union-attr]
            if step == "cast":
                expr = WeightExpr("cast", (expr,), {"dtype": "f32"})
            elif step == "slice" and rows > 4:
                attrs: Any = {"dim": 0, "start": 2, "stop": rows - rows % 4 - 2}
                expr = WeightExpr("slice", (expr,), attrs)
            elif step == "halves" and rows % 4 == 0:
                expr = WeightExpr("reshape", (expr,), {"shape": (2, rows // 4, 2, depth)})
                expr = WeightExpr("transpose", (expr,), {"perm": (0, 2, 1, 3)})
                expr = WeightExpr("reshape", (expr,), {"shape": (rows, depth)})
        parts.append(expr)
    return parts[0] if count == 1 else WeightExpr("concat", tuple(parts), {"dim": 0})


@given(data=st.data(), stored=st.sampled_from(FORMATS))
def test_rows_are_carried_bit_for_bit(data: st.DataObject, stored: str) -> None:
    expr = data.draw(row_expressions(stored))
    before = product(expr)
    result = adopt(before)
    (node,) = (one for one in result.program.nodes if one.op == "scaled_linear")
    assert node.attrs["scheme"] == stored
    codes, scales = (
        evaluate_expr(result.program.weights[ref.name].expr, before.loaders)
        for ref in node.weights()
    )
    wanted = evaluate_expr(expr, before.loaders)
    assert torch.equal(GGUF_FORMATS[stored].decode(codes, scales, wanted.shape[-1]), wanted)


@pytest.mark.parametrize("stored", FORMATS)
def test_the_loss_is_that_of_the_rows_alone(stored: str) -> None:
    """The weights of a sample are on the grid of the file: 4 bits lose no more than 8."""
    before = product(leaf("a", 40, 96, stored), leaf("b", 24, 96, stored))
    one = AdoptFormats(scheme="adopt")
    assert one.allowed_error == 0.02
    after = adopt(before).program
    Verifier().check_pass(one, before, after)
    # Rows in another order are no rounding.
    (name,) = (name for name in after.weights if name == "w0.weight.codes")
    codes = after.weights[name]
    turned = WeightExpr("reshape", (codes.expr,), {"shape": (2, 20, codes.type.shape[-1])})  # type: ignore[dict-item]
    turned = WeightExpr("transpose", (turned,), {"perm": (1, 0, 2)})
    turned = WeightExpr("reshape", (turned,), {"shape": codes.type.shape})  # type: ignore[dict-item]
    wrong = replace(after, weights={**after.weights, name: replace(codes, expr=turned)})
    with pytest.raises(PassError, match="breaks its contract"):
        Verifier().check_pass(one, before, wrong)


class NothingLost(AdoptFormats):
    """What may differ is the order of sums."""

    allowed_error = 1e-5


@pytest.mark.parametrize("stored", FORMATS)
def test_nothing_is_lost_where_rows_stay_as_they_are(stored: str) -> None:
    before = product(leaf("a", 40, 96, stored), leaf("b", 24, 96, stored), table=True)
    one = NothingLost(scheme="adopt-weights")
    after = adopt(before, scheme="adopt-weights").program
    Verifier().check_pass(one, before, after)
    ops = [node.op for node in after.nodes]
    assert ops == ["scaled_embedding", "decoded_linear", "decoded_linear"]
    assert {node.attrs["scheme"] for node in after.nodes} == {f"{stored}-weights"}
    with pytest.raises(PassError, match="breaks its contract"):
        Verifier().check_pass(one, before, adopt(before).program)


def test_a_table_that_is_the_head_is_adopted_once() -> None:
    after = adopt(product(leaf("a", 50, 32, "q8_0"), table=True)).program
    table, head = (node for node in after.nodes if node.op.startswith("scaled"))
    assert table.inputs[:2] == head.inputs[2:]
    assert len(after.weights) == 2


REFUSED = {
    "no kernel for Q6_K": leaf("a", 32, 32, "q6_k"),
    "transpose changes the inside": WeightExpr(
        "transpose", (leaf("a", 32, 32, "q8_0"),), {"perm": (1, 0)}
    ),
    "slice changes the inside": WeightExpr(
        "slice", (leaf("a", 32, 64, "q8_0"),), {"dim": 1, "start": 0, "stop": 32}
    ),
    "reshape changes the inside": WeightExpr(
        "reshape", (leaf("a", 32, 64, "q8_0"),), {"shape": (64, 32)}
    ),
    "concat changes the inside": WeightExpr(
        "concat", (leaf("a", 32, 32, "q8_0"), leaf("b", 32, 32, "q8_0")), {"dim": 1}
    ),
    "add changes the inside": WeightExpr("add", (leaf("a", 32, 32, "q8_0"),), {"value": 1.0}),
    "stored in Q4_0 and Q8_0": WeightExpr(
        "concat", (leaf("a", 32, 32, "q8_0"), leaf("b", 32, 32, "q4_0")), {"dim": 0}
    ),
    "a part of it is not stored in few bits": WeightExpr(
        "concat", (leaf("a", 32, 32, "q8_0"), leaf("b", 32, 32, None)), {"dim": 0}
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_kept_is_said_and_becomes_int8(reason: str) -> None:
    before = product(REFUSED[reason])
    result = adopt(before)
    assert (result.program, result.matches) == (before, 0)
    (found,) = result.near_misses
    miss = str(found)
    assert reason in miss
    after = QuantizeWeights(scheme="adopt").run(before, PassContext()).program
    assert after.nodes[-1].attrs["scheme"] == "int8"
    after = QuantizeWeights(scheme="adopt-weights").run(before, PassContext()).program
    assert after.nodes[-1].attrs["scheme"] == "int8-weights"


def test_numbers_that_the_file_does_not_round_stay() -> None:
    before = product(leaf("a", 32, 32, None), leaf("b", 32, 32, "q8_0"))
    result = adopt(before)
    assert (result.matches, result.near_misses) == (1, ())
    again = QuantizeWeights(scheme="adopt").run(result.program, PassContext())
    assert again.matches == 0
    assert "does not hold it in a format of few bits" in str(again.near_misses[0])


def test_rules_choose_what_is_adopted() -> None:
    before = product(*(leaf(name, 32, 32, "q4_1") for name in "abc"))
    options = {"scheme": "int4", "rules": "w0=adopt w1=none"}
    first = adopt(before, **options)
    assert first.matches == 1
    # The rule for what is adopted has been used, and rows are quantised once.
    second = QuantizeWeights(**options).run(first.program, PassContext()).program
    verify(second)
    schemes = [node.attrs.get("scheme") for node in second.nodes if node.op.endswith("linear")]
    assert schemes == ["q4_1", None, "int4"]
    assert len([node for node in second.nodes if node.op == "quantize_rows"]) == 1
    with pytest.raises(UsageError, match="no matrix is named w9"):
        QuantizeWeights(**{**options, "rules": "w9=adopt"}).run(first.program, PassContext())


def test_a_model_without_packed_tensors_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no matrix of the model is stored .*use int8 or int4"):
        adopt(product(leaf("a", 32, 32, None)))
