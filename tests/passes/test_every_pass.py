"""One property over every pass: on random programs it keeps meaning, form and itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from infc.ir.errors import PassError
from infc.ir.interpret import interpret
from infc.ir.ops import get_op
from infc.ir.program import Program
from infc.ir.text import parse_program, print_program
from infc.ir.verify import verify
from infc.passes.base import Pass, PassContext
from infc.passes.catalogue import OUR_PASSES
from infc.passes.compare import difference

from ..ir.strategies import programs, sample, sample_inputs


def _weights(program: Program, name: str) -> torch.Tensor:
    """Random checkpoint tensors by their own names, whatever a pass has made of them."""
    from infc.ir.program import WeightExpr
    from infc.ir.weights import evaluate_expr

    weight = program.weights[name]

    def load(leaf: str) -> torch.Tensor:
        sizes = [int(size) for size in leaf.removeprefix("w").split(".")[0].split("x")]
        kind = type(weight.type)(weight.type.dtype, tuple(sizes))
        return sample(kind, {}, f"0@{leaf}")

    assert isinstance(weight.expr, WeightExpr)
    return evaluate_expr(weight.expr, {**program.loaders, "checkpoint": load})


def _run(program: Program) -> list[torch.Tensor]:
    inputs = sample_inputs(program, tokens=7)
    return interpret(program, inputs, lambda name: _weights(program, name))


def _is_stateful(program: Program) -> bool:
    return any(get_op(node.op).effects for node in program.nodes)


@pytest.mark.parametrize("kind", OUR_PASSES, ids=lambda kind: kind.name)
@settings(max_examples=40)
@given(program=programs())
def test_keeps_what_programs_mean(kind: type[Pass], program: Program) -> None:
    before = print_program(program)
    try:
        result = kind().run(program, PassContext())
    except PassError:
        assert kind.name == "lower-kv", "only lower-kv may refuse a random program"
        return
    after = result.program
    assert print_program(program) == before, "a pass never changes the program it is given"
    assert (result.matches == 0) == (after is program)
    verify(after)
    assert parse_program(print_program(after)) == after
    again = kind().run(after, PassContext())
    assert again.matches == 0, f"a second run matches again:\n{print_program(again.program)}"
    assert again.program is after
    if _is_stateful(after):
        return  # compared with paged steps in test_architectures
    for old, new in zip(_run(program), _run(after), strict=True):
        assert difference(old, new).error < 1e-4


def test_every_pass_documents_itself_in_five_lines() -> None:
    for kind in OUR_PASSES:
        name, doc = kind.name, kind.__doc__ or ""
        assert "=>" in doc, name
        for word in ("Requires:", "Ensures:", "Keeps:", "Why:"):
            assert word in doc, f"{name} does not say {word}"
