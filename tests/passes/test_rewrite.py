"""A user's own rewrite: from a module named in a recipe, and its errors."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infc
from infc.driver.cli import run
from infc.ir.errors import PassError, ProgramError, UsageError
from infc.ir.text import parse_program, print_program
from infc.ir.weights import evaluate_weight
from infc.passes.base import Pass, PassContext, make_pass
from infc.passes.match import OpPattern, Rule, Var, rewrite_all
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import build_pipeline
from infc.passes.remove_no_op import RemoveNoOp
from infc.passes.rewrite import ops, rewrite
from infc.testing import check_rewrite

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
    assert result.near_misses == (), "what a condition declines was not meant"


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
      %h = linear(%x, @w) : f32[T, 8]  layer 0 from "model.layers.0.mlp"
      %y = linear(%h, @head) : f32[T, 16]  from "lm_head"
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


def cap_head() -> type[Pass]:
    """A soft cap of the logits alone, as a user writes it."""

    def capped(x: Any, w: Any, *, cap: float = 30.0, label: str = "a") -> Any:
        return cap * ops.tanh(ops.linear(x, w) / cap)

    def of_the_head(x: Any, w: Any) -> bool:
        assert x.module in ("model.layers.0.mlp", None)
        return w.name == "head" and w.module == "lm_head" and w.layer is None and x.layer == 0

    return rewrite(
        "cap-logits", lambda x, w: ops.linear(x, w), capped, when=of_the_head, contract="lossy"
    )


def test_options_come_from_the_recipe() -> None:
    kind = cap_head()
    assert make_pass(kind, {}).option_values() == {"cap": 30.0, "label": "a"}
    one = make_pass(kind, {"cap": 5})
    assert one.spell() == "cap-logits{cap=5.0}"
    program = one.run(parse_program(HEAD), PassContext()).program
    assert {node.inputs[-1] for node in program.nodes if node.op == "div"} == {5.0}
    with pytest.raises(UsageError, match="did you mean 'cap'"):
        make_pass(kind, {"kap": 5})
    with pytest.raises(UsageError, match="expected float"):
        make_pass(kind, {"cap": "low"})


def test_a_handle_knows_its_name_layer_and_module() -> None:
    result = cap_head()().run(parse_program(HEAD), PassContext())
    assert result.matches == 1
    assert result.near_misses == ()
    assert [node.op for node in result.program.nodes if node.layer == 0] == ["linear"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, *, before=1: x, "a reserved name"),
        (lambda x, *, name="a": x, "a reserved name"),
        (lambda x, *, tolerance=1.0: x, "a reserved name"),
        (lambda x, *, k: x, "needs a default"),
        (lambda x, *, k=(): x, "needs a default"),
    ],
)
def test_options_that_cannot_be_are_refused(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        rewrite("r", lambda x: ops.silu(x), function)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (lambda x, w: ops.rms_norm(x, w, eps=1e-5), 1),
        (lambda x, w: ops.rms_norm(x, w, eps=1e-5, round_before_scale=...), 2),
        (lambda x, w: ops.rms_norm(x, w, ...), 3),
        (lambda x, w: ops.rms_norm(x, w, ..., round_before_scale=False), 1),
    ],
)
def test_attributes_that_may_be_anything(pattern: Callable[..., Any], matches: int) -> None:
    text = """
    program "norms" phase captured {
      symbol T: 1..64
      weight @w: f32[8]
      input %x: f32[T, 8]
      %0 = rms_norm(%x, @w) {eps = 1e-5} : f32[T, 8]
      %1 = rms_norm(%0, @w) {eps = 1e-5, round_before_scale = false} : f32[T, 8]
      %2 = rms_norm(%1, @w) {eps = 1e-6} : f32[T, 8]
      output %2
    }"""
    kind = rewrite("drop-scale", pattern, lambda x, w: ops.neg(x))
    assert kind().run(parse_program(text), PassContext()).matches == matches


def test_anything_is_not_for_replacements() -> None:
    kind = rewrite("any", lambda x, w: ops.linear(x, w), lambda x, w: ops.sum(x, dims=...))
    with pytest.raises(UsageError, match="not in a replacement"):
        kind().run(parse_program(HEAD), PassContext())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_what_depends_on_weights_alone_is_computed_when_compiling(dtype: str) -> None:
    """Two products by one row are one product by the sum; no step adds the weights."""
    kind = rewrite(
        "add-weights",
        lambda x, a, b: ops.linear(x, a) + ops.linear(x, b),
        lambda x, a, b: ops.linear(x, a + b * 1.0),
        contract="reassociates",
    )
    program = check_rewrite(
        kind, x=f"{dtype}[T, 16]", a=f"@{dtype}[8, 16]", b=f"@{dtype}[8, 16]", matches=1
    )
    assert [node.op for node in program.nodes] == ["linear"]
    (weight,) = program.weights.values()
    assert parse_program(print_program(program)) == program
    a, b = (program.loaders["checkpoint"](name) for name in "ab")
    made = evaluate_weight(program, weight)
    assert made.dtype == a.dtype
    assert torch.equal(made, a + b * 1.0)


def test_a_wrong_weight_is_seen() -> None:
    kind = rewrite(
        "add-weights",
        lambda x, a, b: ops.linear(x, a) + ops.linear(x, b),
        lambda x, a, b: ops.linear(x, a + a),
        contract="reassociates",
    )
    with pytest.raises(PassError, match="breaks its contract"):
        check_rewrite(kind, x="f32[T, 16]", a="@f32[8, 16]", b="@f32[8, 16]")


def test_check_rewrite_says_what_is_missing() -> None:
    kind = rewrite("twice", lambda x, w: ops.mul(ops.silu(x), w), lambda x, w: ops.silu(x) * w)
    check_rewrite(kind, x="f32[T, 16]", w=2.0)
    with pytest.raises(UsageError, match="lacks w"):
        check_rewrite(kind, x="f32[T]")
    with pytest.raises(UsageError, match="has no parameter y"):
        check_rewrite(kind, x="f32[T]", w=1, y=2)
    with pytest.raises(AssertionError, match="matched 0 times"):
        check_rewrite(kind, HEAD)
    with pytest.raises(AssertionError, match="matched 1 times, not 2"):
        check_rewrite(kind, matches=2, x="f32[T, 16]", w=2.0)
    with pytest.raises(UsageError, match="is not a rewrite rule"):
        check_rewrite(RemoveNoOp, x="f32[T]")


BROKEN = """from infc import ops, rewrite


def before(x):
    return ops.silu(x)


def divides(x):
    return ops.silu(x) * (1 / 0)


def misuses(x):
    return ops.linear(x)


def off(x):
    return ops.silu(x) * 1.01


Divides = rewrite("divides", before, divides)
Misuses = rewrite("misuses", before, misuses)
Off = rewrite("off", before, off)
Declines = rewrite("declines", before, off, when=lambda x: x.kap)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Divides", "ZeroDivisionError: division by zero (broken_rewrites.py, line 9)"),
        ("Misuses", "takes (x, w, bias?), given 1 operands (broken_rewrites.py, line 13)"),
        ("Off", "pass off (broken_rewrites.py, line 16): breaks its contract 'exact'"),
        ("Declines", "AttributeError: 'Handle' object has no attribute 'kap' (broken_rewrites.py"),
    ],
)
def test_errors_name_the_users_file_and_line(
    name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken_rewrites.py").write_text(BROKEN)
    (tmp_path / "p.ir").write_text(
        'program "p" { symbol T: 1..64 input %x: f32[T, 8] %0 = silu(%x) : f32[T, 8] output %0 }'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_rewrites", raising=False)
    assert run(["opt", "p.ir", "-p", f"broken_rewrites:{name}", "--verify", "--stats"]) == 4
    assert words in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_what_passes_did_is_told_beside_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "p.ir"
    place.write_text(HEAD)
    command = ["-p", "quantize-weights{scheme=int8}", "--stats", "--verify"]
    assert run(["opt", str(place), *command]) == 0
    said = capsys.readouterr()
    assert parse_program(said.out).name == "head"
    assert re.search(r"quantize-weights +2 +\+2 = 4 .* lossy +\d+ regions", said.err)
    assert "not measured on a whole run" in said.err


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


def test_a_node_that_the_replacement_still_reads_does_not_count_as_gone() -> None:
    """The result is its own pattern, of as many nodes: applied again and again it never ends."""
    kind = rewrite("twice", lambda x, y: ops.neg(x) + y, lambda x, y: y + y)
    text = """
    program "p" phase captured {
      symbol T: 1..64
      input %x: f32[T, 8]
      %a = neg(%x) : f32[T, 8]
      %r = add(%a, %a) : f32[T, 8]
      output %r
    }"""
    result = kind().run(parse_program(text), PassContext())
    assert [node.op for node in result.program.nodes] == ["neg", "add"]
    assert result.matches == 1


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
    with pytest.raises(ProgramError, match="did you mean 'silu'"):
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
    assert "its replacement would be f32[T, 1]" in str(result.near_misses[0])


def test_the_public_names_are_these() -> None:
    assert infc.rewrite is rewrite
