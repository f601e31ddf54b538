"""Weight expressions: meaning, types, laziness, and checkpoints that cannot be used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import CheckpointError, InfcError, ProgramError
from infc.ir.program import Program, Weight, WeightExpr
from infc.ir.text import parse_expr, print_expr
from infc.ir.torch_types import from_torch
from infc.ir.types import DType, TensorType
from infc.ir.weights import (
    WeightOp,
    checkpoint,
    evaluate_expr,
    evaluate_weight,
    infer_weight,
    leaves,
    program_weights,
    register_weight_op,
    require_finite,
)

TENSORS = {"a": torch.randn(4, 6), "b": torch.randn(4, 6), "n": torch.full((3,), float("nan"))}
LOADERS = {"checkpoint": TENSORS.__getitem__, "data": lambda key: torch.arange(float(key))}
KIND = TensorType(DType.F32, (4, 6))


def evaluate(text: str) -> torch.Tensor:
    return evaluate_expr(parse_expr(text), LOADERS)


def test_expressions_mean_what_torch_does() -> None:
    a, b = TENSORS["a"], TENSORS["b"]
    one, two = 'checkpoint{name = "a"}', 'checkpoint{name = "b"}'
    cases = {
        f"concat{{dim = 0}}({one}, {two})": torch.cat([a, b]),
        f"stack{{dim = 2}}({one}, {two})": torch.stack([a, b], 2),
        f"slice{{dim = 1, start = 2, stop = 5}}({one})": a[:, 2:5],
        f"transpose{{perm = (1, 0)}}({one})": a.T,
        f"reshape{{shape = (2, 12)}}({one})": a.reshape(2, 12),
        f'cast{{dtype = "bf16"}}({one})': a.bfloat16(),
        f"add{{value = 1.0}}({one})": a + 1,
        f"mul{{value = -0.5}}({one})": a * -0.5,
        'data{key = "3"}': torch.tensor([0.0, 1.0, 2.0]),
    }
    for text, wanted in cases.items():
        assert torch.equal(evaluate(text), wanted), text


@st.composite
def expressions(draw: st.DrawFn) -> WeightExpr:
    expr = checkpoint(draw(st.sampled_from("ab")), KIND)
    for _ in range(draw(st.integers(0, 5))):
        kind = infer_weight(expr)
        assert kind is not None
        rows = int(str(kind.shape[0]))
        start = draw(st.integers(0, rows - 1))
        steps = {
            "concat": WeightExpr("concat", (expr, expr), {"dim": draw(st.integers(0, 1))}),
            "slice": WeightExpr("slice", (expr,), {"dim": 0, "start": start, "stop": rows}),
            "transpose": WeightExpr("transpose", (expr,), {"perm": (1, 0)}),
            "reshape": WeightExpr("reshape", (expr,), {"shape": (kind.num_elements(), 1)}),
            "cast": WeightExpr("cast", (expr,), {"dtype": draw(st.sampled_from(["f16", "f64"]))}),
            "mul": WeightExpr("mul", (expr,), {"value": 2.0}),
        }
        expr = steps[draw(st.sampled_from(sorted(steps)))]
    return expr


@given(expressions())
def test_inferred_types_are_those_of_the_tensors(expr: WeightExpr) -> None:
    tensor = evaluate_expr(expr, LOADERS)
    assert infer_weight(expr) == TensorType(from_torch(tensor.dtype), tuple(tensor.shape))
    assert len(leaves(expr)) >= 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('shuffle(checkpoint{name = "a"})', "unknown weight op shuffle"),
        ('concat(checkpoint{name = "a"})', "dim is missing"),
        ("concat{dim = 0}", "inputs"),
        ("checkpoint{name = 3}", "attribute name"),
        ('checkpoint{name = "a", dtype = "f31", shape = (4, 6)}', "unknown element type 'f31'"),
        ('add{value = "x"}(checkpoint{name = "a"})', "value"),
        ('reshape{shape = (5, 5)}(checkpoint{name = "a"})', "failed"),
        (
            'concat{dim = 0}(checkpoint{name = "a"}, cast{dtype = "f64"}(checkpoint{name = "a"}))',
            "types",
        ),
    ],
)
def test_malformed_expressions_are_refused(text: str, match: str) -> None:
    with pytest.raises(InfcError, match=match):
        evaluate(text)


def with_weight(name: str, kind: TensorType, expr: WeightExpr) -> Program:
    empty = ProgramBuilder("p").build()
    return replace(empty, weights={name: Weight(name, kind, expr)}, loaders=LOADERS)


def test_a_weight_must_be_of_its_declared_type_and_finite() -> None:
    program = with_weight("w", KIND, checkpoint("a"))
    assert torch.equal(evaluate_weight(program, "w"), TENSORS["a"])
    with pytest.raises(CheckpointError, match=r"@w: is f32\[4, 6\], expected bf16"):
        evaluate_weight(with_weight("w", TensorType(DType.BF16, (4, 6)), checkpoint("a")), "w")
    with pytest.raises(CheckpointError, match=r"a: is f32\[4, 6\], expected f32\[6, 4\]"):
        evaluate_weight(with_weight("w", KIND, checkpoint("a", TensorType(DType.F32, (6, 4)))), "w")
    bad = with_weight("w", TensorType(DType.F32, (3,)), checkpoint("n"))
    with pytest.raises(CheckpointError, match=r"@w \(of n .*\): holds NaN"):
        evaluate_weight(bad, "w")
    assert evaluate_weight(bad, "w", check_finite=False).isnan().all()
    with pytest.raises(CheckpointError, match="loaders"):
        evaluate_weight(replace(program, loaders={}), "w")
    with pytest.raises(ProgramError, match="no weight @v"):
        evaluate_weight(program, "v")


def test_values_whose_sum_overflows_are_finite() -> None:
    require_finite(torch.full((8,), 3e38), "w")
    with pytest.raises(CheckpointError, match="infinity"):
        require_finite(torch.tensor([1.0, float("inf")], dtype=torch.float16), "w")


def test_weights_are_made_once_and_on_demand() -> None:
    read: list[str] = []

    def load(name: str) -> torch.Tensor:
        read.append(name)
        return TENSORS[name]

    program = replace(with_weight("w", KIND, checkpoint("a")), loaders={"checkpoint": load})
    source = program_weights(program)
    assert not read
    assert source("w") is source("w")
    assert read == ["a"]


def test_a_backend_can_add_an_op_once() -> None:
    op = WeightOp("test_flip", lambda parts, attrs: parts[0].flip(0), lambda kinds, attrs: kinds[0])
    register_weight_op(op)
    assert torch.equal(evaluate('test_flip(checkpoint{name = "a"})'), TENSORS["a"].flip(0))
    with pytest.raises(ProgramError, match="twice"):
        register_weight_op(op)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('compute{op = "add"}(A, B)', "f32[4, 6]"),
        ('compute{op = "sub", literals = ((0, 1.0),)}(A)', "f32[4, 6]"),
        ('compute{op = "linear"}(A, B)', "f32[4, 4]"),
        ('compute{op = "sum", attrs = (("dims", (0,)), ("keepdim", false))}(A)', "f32[6]"),
        ('compute{op = "where", literals = ((2, 0.5),)}(compute{op = "lt"}(A, B), A)', "f32[4, 6]"),
    ],
)
def test_any_op_computes_a_weight(text: str, kind: str) -> None:
    leaf = 'checkpoint{{name = "{}", dtype = "f32", shape = (4, 6)}}'
    expr = parse_expr(text.replace("A", leaf.format("a")).replace("B", leaf.format("b")))
    assert str(infer_weight(expr)) == kind
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    found = evaluate_expr(expr, {"checkpoint": {"a": a, "b": b}.__getitem__})
    wanted = {
        "add": lambda: a + b,
        "sub": lambda: 1.0 - a,
        "linear": lambda: a @ b.T,
        "sum": lambda: a.sum(0),
        "where": lambda: torch.where(a < b, a, 0.5),
    }[str(expr.attrs["op"])]()
    assert torch.allclose(found, wanted, atol=1e-6)
    assert parse_expr(print_expr(expr)) == expr


def test_a_weight_that_cannot_be_computed_is_refused() -> None:
    leaf = 'checkpoint{name = "a", dtype = "f32", shape = (4, 6)}'
    for text, words in (
        (f'compute{{op = "ad"}}({leaf})', "unknown op ad"),
        (f'compute{{op = "add"}}({leaf})', r"takes \(a, b\)"),
        (f"compute({leaf})", "attribute op is missing"),
        (f'compute{{op = "quantize_rows"}}({leaf})', "has 2 results"),
    ):
        with pytest.raises(ProgramError, match=words):
            infer_weight(parse_expr(text))
