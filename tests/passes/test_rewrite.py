"""A user's own rewrite: from a module named in a recipe, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

import infc
from infc.ir.errors import ProgramError, UsageError
from infc.ir.text import parse_program
from infc.passes.base import PassContext
from infc.passes.match import Var
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import build_pipeline
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
