"""A user's own rewrite: from a module named in a recipe, and its errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import infc
from infc.ir.errors import ProgramError, UsageError
from infc.ir.text import parse_program
from infc.passes.base import PassContext
from infc.passes.match import OpPattern, Rule, Var, rewrite_all
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import build_pipeline
from infc.passes.remove_no_op import RemoveNoOp
from infc.passes.rewrite import ops, rewrite

from .test_verification import model

MODULE = '''"""Writes x * sigmoid(x) for silu(x)."""

from infc import rewrite
from infc.passes.rewrite import ops


def before(x):
    return ops.silu(x)


def after(x):
    return x * ops.sigmoid(x)


MyPass = rewrite("spell-silu", before, after, contract="reassociates")
'''


def test_a_users_rewrite_in_twenty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(MODULE.splitlines()) <= 20
    (tmp_path / "my_rewrites.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    pipeline = build_pipeline(
        {
            "my_rewrites:MyPass": {"before": "merge-gate-up"},
            "lower-kv": False,
            "plan-memory": False,
        }
    )
    program, report = run_pipeline(model(), pipeline)
    mine = next(one for one in report.passes if one.name == "spell-silu")
    assert mine.matches == 4
    assert "1 distinct ones run" in mine.verified
    assert not any(node.op == "silu" for node in program.nodes)
    assert sum(node.op == "sigmoid" for node in program.nodes) == 4


def test_attributes_and_conditions() -> None:
    kind = rewrite(
        "halve-eps",
        lambda x, w, eps: ops.rms_norm(x, w, eps=eps),
        lambda x, w, eps: ops.rms_norm(x, w, eps=eps / 2),
        when=lambda x, w, eps: eps > 0.5 and x.shape[-1] == 8 and w.is_weight,
        contract="lossy",
    )
    text = """
    program "norms" phase captured {
      symbol T: 1..64
      weight @w: f32[8]
      input %x: f32[T, 8]
      %0 = rms_norm(%x, @w) {eps = 1.0} : f32[T, 8]
      %1 = rms_norm(%0, @w) {eps = 0.25} : f32[T, 8]
      %2 = rms_norm(%1, @w) {eps = 1.0, round_before_scale = false} : f32[T, 8]
      output %2
    }"""
    result = kind().run(parse_program(text), PassContext())
    assert [node.attrs["eps"] for node in result.program.nodes] == [0.5, 0.25, 1.0]
    assert result.matches == 1
    assert any("the condition of halve-eps does not hold" in miss for miss in result.near_misses)


def test_one_value_that_stands_twice_in_a_pattern_is_one_value() -> None:
    def pattern(x: Var) -> object:
        e = ops.exp(x)
        return ops.add(e, ops.neg(e))

    kind = rewrite("cancel", pattern, lambda x: ops.mul(x, 0.0))
    text = """
    program "p" phase captured {{
      symbol T: 1..64
      input %x: f32[T, 8]
      input %y: f32[T, 8]
      %0 = exp(%x) : f32[T, 8]
      %1 = exp({other}) : f32[T, 8]
      %2 = neg({used}) : f32[T, 8]
      %3 = add(%2, %0) : f32[T, 8]
      output %3
    }}"""
    same = parse_program(text.format(other="%y", used="%0"))
    other = parse_program(text.format(other="%y", used="%1"))
    assert kind().run(same, PassContext()).matches == 1
    assert kind().run(other, PassContext()).matches == 0


HEAD = """
    program "head" phase captured {
      symbol T: 1..64
      weight @w: f32[8, 8]
      weight @head: f32[16, 8]
      input %x: f32[T, 8]
      %h = linear(%x, @w) : f32[T, 8]  layer 0
      %y = linear(%h, @head) : f32[T, 16]
      output %y
    }"""


def test_a_replacement_that_holds_its_pattern_is_put_in_once() -> None:
    """A soft cap of the logits is the linear layer and a tanh around it."""

    def capped(x: Any, w: Any) -> Any:
        return 30.0 * ops.tanh(ops.linear(x, w) / 30.0)

    kind = rewrite("cap-logits", lambda x, w: ops.linear(x, w), capped, contract="lossy")
    result = kind().run(parse_program(HEAD), PassContext())
    counts = Counter(node.op for node in result.program.nodes)
    assert counts == {"linear": 2, "div": 2, "tanh": 2, "mul": 2}
    assert result.matches == 2
    assert result.near_misses == ()


@pytest.mark.parametrize(
    "after",
    [
        lambda x: ops.neg(ops.neg(ops.neg(x))),
        lambda x: ops.neg(ops.abs(x)),
        lambda x: ops.neg(x) + ops.neg(x),
        lambda x: ops.neg(x),
    ],
)
def test_a_rule_does_not_meet_its_own_results(after: Callable[[Any], Any]) -> None:
    text = """
    program "p" phase captured {
      symbol T: 1..64
      input %x: f32[T, 8]
      %0 = neg(%x) : f32[T, 8]
      %1 = neg(%0) : f32[T, 8]
      output %1
    }"""
    kind = rewrite("again", lambda x: ops.neg(x), after)
    result = kind().run(parse_program(text), PassContext())
    assert result.matches == 2, "once for each that was there"


def test_two_rules_that_undo_each_other_end() -> None:
    def rule(op: str, other: str) -> Rule:
        return Rule(OpPattern(op, (Var("x"),)), lambda emit, match: emit(other, match.value("x")))

    text = """
    program "p" phase captured {
      symbol T: 1..64
      input %x: f32[T, 8]
      %0 = sin(%x) : f32[T, 8]
      output %0
    }"""
    swept = rewrite_all(parse_program(text), [rule("sin", "cos"), rule("cos", "sin")])
    assert swept.matches == 2


@given(count=st.integers(1, 90))
def test_a_rule_that_makes_less_meets_its_own_results(count: int) -> None:
    """Three negations are one; a view of a view is one view, however many there are."""
    lines = [f"%{i + 1} = neg(%{i}) : f32[T, 8]" for i in range(count)]
    views = [
        f'%v{i + 1} = reshape(%{f"v{i}" if i else count}) {{shape = ("T", {2 + 6 * (i % 2)}, '
        f"{4 - 3 * (i % 2)})}} : f32[T, {2 + 6 * (i % 2)}, {4 - 3 * (i % 2)}]"
        for i in range(count)
    ]
    text = "\n".join(
        ['program "p" { symbol T input %0: f32[T, 8]', *lines, *views, f"output %v{count} }}"]
    )
    kind = rewrite("less", lambda x: ops.neg(ops.neg(ops.neg(x))), lambda x: ops.neg(x))
    program = kind().run(parse_program(text), PassContext()).program
    assert sum(node.op == "neg" for node in program.nodes) == (1 if count % 2 else 2)
    program = RemoveNoOp().run(program, PassContext()).program
    assert [node.op for node in program.nodes] == ["neg"] * (count % 2) + ["reshape"]


@pytest.mark.parametrize(
    ("pattern", "found", "matches"),
    [
        ("0.0", "0.0", True), ("0.0", "-0.0", False), ("-0.0", "0.0", False),
        ("2.0", "2", True), ("2", "2.0", True), ("1", "true", False), ("nan", "nan", True),
    ],
)  # fmt: skip
def test_literals_of_patterns_meet_their_like(pattern: str, found: str, matches: bool) -> None:
    text = f"""
    program "p" phase captured {{
      symbol T: 1..64
      input %x: f32[T, 8]
      %0 = mul(%x, {found}) : f32[T, 8]
      output %0
    }}"""
    number = int(pattern) if pattern.isdigit() else float(pattern)
    kind = rewrite("times", lambda x: x * number, lambda x: ops.neg(x))
    assert kind().run(parse_program(text), PassContext()).matches == matches


def test_bad_rewrites_are_refused_where_they_are_made() -> None:
    with pytest.raises(ProgramError, match="did you mean silu"):
        rewrite("r", lambda x: ops.sillu(x), lambda x: x)
    with pytest.raises(UsageError, match="never uses its parameter y"):
        rewrite("r", lambda x, y: ops.silu(x), lambda x, y: x)
    with pytest.raises(UsageError, match="the pattern"):
        rewrite("r", lambda x: ops.silu(x), lambda z: z)
    with pytest.raises(UsageError, match="has no attribute"):
        rewrite("r", lambda x: ops.softmax(x, dims=1), lambda x: x)
    with pytest.raises(UsageError, match="contract"):
        rewrite("r", lambda x: ops.silu(x), lambda x: x, contract="fast")
    with pytest.raises(UsageError, match="must return an op"):
        rewrite("r", lambda x: x, lambda x: x)
    with pytest.raises(UsageError, match="takes"):
        rewrite("r", lambda x: ops.add(x), lambda x: x)


def test_a_replacement_of_another_shape_is_declined() -> None:
    kind = rewrite("flatten", lambda x: ops.silu(x), lambda x: ops.sum(x, dims=(1,), keepdim=True))
    result = kind().run(model(), PassContext())
    assert result.matches == 0
    assert "its replacement would be f32[T, 1]" in result.near_misses[0]


def test_the_public_names_are_these() -> None:
    assert infc.rewrite is rewrite
