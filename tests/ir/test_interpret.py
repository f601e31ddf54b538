"""The interpreter: errors that name the node, intermediate values, and values that are freed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError
from infc.ir.interpret import Interpreter, interpret
from infc.ir.program import Node, Program, Value
from infc.ir.types import DType, Sym, TensorType

X = torch.arange(6.0).reshape(3, 2)


def program() -> Program:
    b = ProgramBuilder("p")
    b.symbol("T")
    x = b.input("x", TensorType(DType.F32, (Sym("T"), 2)))
    y = b.emit("mul", x, b.weight("w", TensorType(DType.F32, (2,))), name="y")
    b.layer = 1
    z = b.emit("reshape", y, name="z", shape=("2*T",))
    b.output(b.emit("neg", z, name="out"))
    return b.build()


def weights(name: str) -> torch.Tensor:
    return torch.tensor([1.0, 10.0])


def test_values_between_are_seen_and_freed() -> None:
    seen: dict[str, torch.Tensor] = {}
    alive: list[int] = []

    def hook(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        seen[node.output.name] = results[0]
        alive.append(len(runner.values))

    runner = Interpreter(program(), weights, hook=hook)
    (out,) = runner.run({"x": X})
    assert out.tolist() == [0, -10, -2, -30, -4, -50]
    assert seen["y"].tolist() == [[0, 10], [2, 30], [4, 50]]
    assert max(alive) == 2, "a value lived on after its last use"
    assert list(runner.values) == ["out"]
    runner = Interpreter(program(), weights, keep=frozenset({"z"}))
    runner.run({"x": X})
    assert set(runner.values) == {"z", "out"}


def test_one_value_can_be_asked_for() -> None:
    ran: list[str] = []
    runner = Interpreter(program(), weights, hook=lambda node, _: ran.append(node.op))
    (y,) = runner.run({"x": X}, upto="y")
    assert y.shape == (3, 2)
    assert ran == ["mul"]
    with pytest.raises(ProgramError, match="no value %nothing"):
        runner.run({"x": X}, upto="nothing")


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({}, "input %x is missing"),
        ({"x": X, "q": X}, "no input %q"),
        ({"x": X.double()}, "element type"),
        ({"x": X[:, :1]}, "shape"),
        ({"x": X[0]}, "shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(ProgramError, match=match):
        interpret(program(), inputs, weights)


def test_a_wrong_declaration_is_named() -> None:
    good = program()
    wrong = Value("z", TensorType(DType.F32, (Sym("T", 3),)))
    nodes = (good.nodes[0], replace(good.nodes[1], outputs=(wrong,)))
    with pytest.raises(ProgramError, match=r"result of reshape %z has 3.T = 6, but T is 3"):
        interpret(good.with_nodes(nodes, outputs=(wrong,)), {"x": X}, weights)
    unbound = replace(good.nodes[1], attrs={"shape": ("2*R",)})
    with pytest.raises(ProgramError, match="%z = reshape of layer 1: its definition failed"):
        interpret(good.with_nodes((good.nodes[0], unbound, good.nodes[2])), {"x": X}, weights)
    with pytest.raises(ProgramError, match=r"%y = mul.*definition failed"):
        interpret(good, {"x": X}, lambda name: torch.ones(5))


def test_symbols_that_no_input_has_take_given_sizes() -> None:
    b = ProgramBuilder("p")
    b.symbol("T")
    b.output(b.emit("full", shape=("T", 2), value=1.5, dtype="f32"))
    program = b.build()
    (made,) = Interpreter(program, weights).run({}, sizes={"T": 3})
    assert torch.equal(made, torch.full((3, 2), 1.5))
    with pytest.raises(ProgramError, match="T"):
        Interpreter(program, weights).run({})
