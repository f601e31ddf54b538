"""What verification must catch, and what it must not take for a fault."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import PassError, Terminated
from infc.ir.program import ModelSpec, Program, Value, WeightExpr
from infc.ir.quantized_pairs import QuantizedPairs
from infc.ir.text import parse_program
from infc.ir.types import DType, Sym, TensorType
from infc.passes.base import Pass, PassContext, PassResult
from infc.passes.catalogue import OUR_PASSES
from infc.passes.compare import difference, distance
from infc.passes.merge_linears import MergeQkv
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import Pipeline
from infc.passes.regions import find_regions, signature
from infc.passes.rewrite import ops, rewrite
from infc.passes.verification import Verifier
from infc.passes.whole_runs import WholeRuns

from ..ir.strategies import programs

LAYERS = 4


def model(layers: int = LAYERS) -> Program:
    """A stack of equal layers over tokens and their positions."""
    spec = ModelSpec("stack", layers, 8, 2, 1, 4, 16, 256)
    b = ProgramBuilder("stack", spec)
    b.symbol("T", 1, 128)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    positions = b.input("positions", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", b.weight("embed", TensorType(DType.F32, (16, 8))), ids)
    seen = b.emit("cast", positions, dtype="f32")
    seen = b.emit("reshape", seen, shape=("T", 1))
    for layer in range(layers):
        b.layer = layer
        gate = b.emit("linear", x, b.weight(f"l{layer}.gate", TensorType(DType.F32, (8, 8))))
        up = b.emit("linear", x, b.weight(f"l{layer}.up", TensorType(DType.F32, (8, 8))))
        x = b.emit("mul", b.emit("silu", gate), up, name=f"out{layer}")
        x = b.emit("add", x, b.emit("mul", seen, 0.01))
    b.output(x)
    return b.build()


def run(program: Program, kind: type[Pass], tmp_path: Path) -> Program:
    after, _ = run_pipeline(program, Pipeline((kind(),)), failure_directory=tmp_path)
    return after


def _wrong_in_one_row() -> type[Pass]:
    """Right in 63 rows of 64, and in the last only up to position 16."""

    def pattern(seen: object, x: object) -> object:
        return x + seen * 0.01  # type: ignore[operator]

    def replacement(seen: object, x: object) -> object:
        late = ops.cast(ops.eq(seen, 41.0), dtype="f32")
        return x + seen * 0.01 + late * 0.001  # type: ignore[operator]

    return rewrite("add-position", pattern, replacement, contract="exact", phase="fuse")


def test_one_wrong_row_of_64_past_position_16_is_caught_and_named(tmp_path: Path) -> None:
    program = model()
    with pytest.raises(PassError) as caught:
        run(program, _wrong_in_one_row(), tmp_path)
    text = str(caught.value)
    assert "pass add-position" in text
    assert "position 41" in text
    assert "row 41 of 67" in text
    assert "1 wrong row" in text
    (kept,) = tmp_path.glob("*.ir")
    assert str(kept) in text
    assert parse_program(kept.read_text()) == program


@dataclass(frozen=True)
class _Edit(Pass):
    """Replaces one weight's expression: the kind of slip that no shape gives away."""

    name: ClassVar[str] = "edit-weights"
    phase: ClassVar[str] = "fuse"
    target: str = "l2.up"
    source: str = "l1.up"

    def run(self, program: Program, context: PassContext) -> PassResult:
        weight = program.weights[self.target]
        expr = WeightExpr("checkpoint", (), {"name": self.source})
        weights = {**program.weights, self.target: replace(weight, expr=expr)}
        return PassResult(replace(program, weights=weights), 1)


def test_another_layers_weight_is_caught_in_the_one_layer_that_reads_it(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"layer 2"):
        run(model(), _Edit, tmp_path)


def test_equal_layers_are_verified_once() -> None:
    program = model()
    merged = next(kind for kind in OUR_PASSES if kind.name == "merge-gate-up")()
    after = merged.run(program, PassContext()).program
    regions = list(find_regions(program, after))
    assert len(regions) == 2 * LAYERS
    assert len({signature(region) for region in regions}) == 2
    assert "2 distinct" in Verifier().check_pass(merged, program, after).text


def test_swapped_results_are_caught(tmp_path: Path) -> None:
    """Both values survive: only their names say which is which."""

    @dataclass(frozen=True)
    class Swap(Pass):
        name: ClassVar[str] = "swap"
        phase: ClassVar[str] = "fuse"

        def run(self, program: Program, context: PassContext) -> PassResult:
            nodes = list(program.nodes)
            first, second = (n for n in nodes if n.op == "linear" and n.layer == 1)
            nodes[nodes.index(first)] = replace(first, inputs=second.inputs)
            nodes[nodes.index(second)] = replace(second, inputs=first.inputs)
            return PassResult(program.with_nodes(tuple(nodes)), 1)

    with pytest.raises(PassError, match="swap"):
        run(model(), Swap, tmp_path)


def test_a_pass_that_lies_about_matching_is_caught(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Liar(Pass):
        name: ClassVar[str] = "liar"
        phase: ClassVar[str] = "fuse"

        def run(self, program: Program, context: PassContext) -> PassResult:
            return PassResult(replace(program, name="other"), 0)

    with pytest.raises(PassError, match="liar"):
        run(model(), Liar, tmp_path)


def test_a_pass_that_raises_is_named_with_what_it_received(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Raises(Pass):
        name: ClassVar[str] = "raises"
        phase: ClassVar[str] = "fuse"

        def run(self, program: Program, context: PassContext) -> PassResult:
            raise ZeroDivisionError("of a user's pass")

    with pytest.raises(
        PassError,
        match=r"pass raises \(.*, line \d+\): ZeroDivisionError: of a user.s pass \(.*, line",
    ):
        run(model(), Raises, tmp_path)
    assert list(tmp_path.glob("00-before-raises.ir"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "returns NoneType instead of a PassResult"),
        (5, "returns int"),
        (..., "SystemExit: 0"),
    ],
)
def test_a_pass_without_a_result_is_named(given: Any, reason: str, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Returns(Pass):
        name: ClassVar[str] = "returns"
        phase: ClassVar[str] = "fuse"

        def run(self, program: Program, context: PassContext) -> Any:
            if given is ...:
                sys.exit(0)
            return given

    with pytest.raises(PassError, match=rf"pass returns \(.*, line \d+\): {reason}"):
        run(model(), Returns, tmp_path)
    assert list(tmp_path.glob("00-before-returns.ir"))


def test_the_end_of_the_process_is_no_fault_of_a_pass(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class IsTerminated(Pass):
        name: ClassVar[str] = "is-terminated"
        phase: ClassVar[str] = "fuse"

        def run(self, program: Program, context: PassContext) -> PassResult:
            raise Terminated(143)

    with pytest.raises(Terminated, match="143"):
        run(model(), IsTerminated, tmp_path)
    assert not list(tmp_path.iterdir())


def step(factors: dict[str, float]) -> Program:
    """A model without layers, whose outputs are multiplied by these factors."""
    b = ProgramBuilder("step", ModelSpec("step", 0, 8, 2, 1, 4, 16, 256))
    b.symbol("T", 1, 128)
    b.symbol("R", 1, 128)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    b.input("positions", TensorType(DType.I64, (Sym("T"),)))
    index = b.input("logits_index", TensorType(DType.I64, (Sym("R"),)))
    x = b.emit("embedding", b.weight("embed", TensorType(DType.F32, (16, 8))), ids)
    hidden = b.emit("take", x, index, dim=0)
    logits = b.emit("linear", hidden, b.weight("head", TensorType(DType.F32, (16, 8))))
    b.output(
        b.emit("mul", logits, factors.get("logits", 1.0)),
        b.emit("mul", hidden, factors.get("hidden states", 1.0)),
    )
    return b.build()


@pytest.mark.parametrize("wrong", ["logits", "hidden states"])
def test_whole_runs_compare_both_outputs(wrong: str) -> None:
    runs = WholeRuns()
    runs.start(step({}))
    assert "agrees" in runs.check("fuse", step({wrong: 1.00001}))
    with pytest.raises(PassError, match=f"^{wrong} of a whole prompt after phase fuse are off by"):
        runs.check("fuse", step({wrong: 1.001}))


def test_whole_runs_miss_an_output_that_a_pass_dropped() -> None:
    runs, program = WholeRuns(), step({})
    runs.start(program)
    with pytest.raises(PassError, match="the program gives logits, expected logits, hidden"):
        runs.check("fuse", replace(program, outputs=program.outputs[:1], output_names=()))


def test_whole_runs_quantise_a_matrix_once() -> None:
    """Each run reads all weights anew, and codes cost more than the run."""
    read: list[str] = []

    def load(name: str) -> torch.Tensor:
        read.append(name)
        return torch.ones(16, 8)

    def quantised(factor: float) -> Program:
        program = step({"logits": factor})
        kind = program.weights["embed"].type
        leaf = WeightExpr("checkpoint", (), {"name": "embed"})
        codes = WeightExpr("codes", (leaf,), {"scheme": "int8-token"})
        weight = replace(
            program.weights["embed"], expr=WeightExpr("cast", (codes,), {"dtype": "f32"})
        )
        weights = {"embed": weight, "head": replace(weight, name="head")}
        assert kind == program.weights["head"].type
        return replace(program, weights=weights, loaders={"checkpoint": load})

    runs = WholeRuns(QuantizedPairs(max_bytes=1000))
    runs.start(quantised(1.0))
    for factor in (1.00001, 1.00002):
        assert "agrees" in runs.check("fuse", quantised(factor))
    assert read == ["embed"]


def test_what_stands_before_a_lossy_pass_has_its_whole_run() -> None:
    """Afterwards there is nothing to compare it with."""
    runs = WholeRuns()
    runs.start(step({}))
    with pytest.raises(PassError, match=r"^logits of a whole prompt after phase before round"):
        runs.rebase(step({"logits": 1.001}), step({"logits": 1.5}), "round")
    found = runs.rebase(step({"logits": 1.00001}), step({"logits": 1.5}), "round")
    assert found is not None
    assert found.error == pytest.approx(0.5, rel=1e-3)
    assert found.kl > 0
    assert found.top1 == 1
    assert found.rows == 37
    assert "nothing changed" in runs.check("plan", step({"logits": 1.5}))
    assert "agrees with the result of round" in runs.check("plan", step({"logits": 1.50001}))
    with pytest.raises(PassError, match="off by"):
        runs.check("plan", step({}))


def test_a_lossy_pass_says_how_far_it_went(tmp_path: Path) -> None:
    """Of exact passes behind it `agrees` is not the whole truth."""
    kind = rewrite(
        "round-head",
        lambda x, w: ops.linear(x, w),
        lambda x, w: ops.linear(x, w) * 1.01,
        contract="lossy",
    )
    said: list[str] = []
    _, report = run_pipeline(
        step({}), Pipeline((kind(),)), PassContext(log=said.append), failure_directory=tmp_path
    )
    (one,) = report.as_data()["passes"]
    assert one["distance"].keys() == {"kl", "top1", "error", "rows", "what"}
    assert one["distance"]["error"] == 0.01
    assert one["distance"]["top1"] == 1
    assert 0 < one["distance"]["kl"] < 1e-4
    assert any("round-head is lossy: KL" in line and "error 0.01 against" in line for line in said)


def test_the_distance_of_predictions() -> None:
    before = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    after = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    found = distance(before, after, "two rows")
    p = float(torch.sigmoid(torch.tensor(4.0, dtype=torch.float64)))
    assert found.kl == pytest.approx((p * 4 - (1 - p) * 4) / 2)
    assert (found.top1, found.error, found.rows) == (0.5, 1.0, 2)


def test_a_malformed_result_is_caught(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Breaks(Pass):
        name: ClassVar[str] = "breaks"
        phase: ClassVar[str] = "fuse"

        def run(self, program: Program, context: PassContext) -> PassResult:
            return PassResult(program.with_nodes(program.nodes[1:]), 1)

    with pytest.raises(PassError, match="malformed"):
        run(model(), Breaks, tmp_path)


def test_a_lossy_pass_is_held_to_its_own_bound(tmp_path: Path) -> None:
    def make(tolerance: float) -> type[Pass]:
        return rewrite(
            "round-silu",
            lambda x: ops.silu(x),
            lambda x: ops.mul(x, ops.sigmoid(x)) * 1.01,
            contract="lossy",
            tolerance=tolerance,
        )

    run(model(), make(0.02), tmp_path)
    with pytest.raises(PassError, match="lossy"):
        run(model(), make(0.005), tmp_path)


def test_concatenated_in_another_order_is_caught(tmp_path: Path) -> None:
    """The merge itself is fine; a weight table that stacks k before q is not."""
    text = """
    program "qkv" phase captured {
      symbol T: 1..64
      weight @q: f32[4, 4]
      weight @k: f32[4, 4]
      weight @v: f32[4, 4]
      input %x: f32[T, 4]
      %q = linear(%x, @q) : f32[T, 4]
      %k = linear(%x, @k) : f32[T, 4]
      %v = linear(%x, @v) : f32[T, 4]
      %q3 = reshape(%q) {shape = ("T", 1, 4)} : f32[T, 1, 4]
      %k3 = reshape(%k) {shape = ("T", 1, 4)} : f32[T, 1, 4]
      %v3 = reshape(%v) {shape = ("T", 1, 4)} : f32[T, 1, 4]
      %0 = attention(%q3, %k3, %v3) {layer = 0, scale = 0.5} : f32[T, 1, 4]
      output %0
    }"""
    program = parse_program(text)
    merged = MergeQkv().run(program, PassContext()).program
    (name,) = merged.weights
    expr = merged.weights[name].expr
    parts = (expr.inputs[1], expr.inputs[0], expr.inputs[2])
    wrong = replace(merged.weights[name], expr=replace(expr, inputs=parts))
    Verifier().check_pass(MergeQkv(), program, merged)
    with pytest.raises(PassError, match="linear"):
        Verifier().check_pass(MergeQkv(), program, replace(merged, weights={name: wrong}))


@settings(max_examples=60)
@given(program=programs())
def test_right_passes_pass(program: Program) -> None:
    for kind in OUR_PASSES:
        if kind.name == "lower-kv":
            continue
        result = kind().run(program, PassContext())
        if result.matches:
            checked = Verifier().check_pass(kind(), program, result.program)
            assert checked.text.endswith("distinct ones run"), "all of it, for it is small"


def test_rows_are_compared_one_by_one() -> None:
    a = torch.ones(64, 8)
    a[3] *= 1e-2
    b = a.clone()
    b[3, 5] += 1e-4
    found = difference(a, b)
    assert (found.row, found.rows, found.bad_rows) == (3, 64, 1)
    assert found.error == pytest.approx(1e-2, rel=1e-3)
    b[5, 0] = float("nan")
    assert difference(a, b).row == 5
    assert difference(a, b).error == float("inf")
    assert difference(a, a).error == 0.0


def test_narrow_rows_that_are_small_by_chance_count_as_the_others() -> None:
    a = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    b = a + 0.01
    assert difference(a, b).error > 0.1
    assert difference(a, b, like_others=True).error < 0.011
    wide = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    other = wide * 1.01
    assert difference(wide, other, like_others=True) == difference(wide, other)


def test_every_value_of_the_sample_is_past_the_first_tiles() -> None:
    program = model()
    value: Value = program.inputs[1]
    from infc.passes.samples import sample_inputs

    near = sample_inputs(program, (value,))[value.name]
    far = sample_inputs(program, (value,), spread=True)[value.name]
    assert near.tolist() == list(range(67))
    assert int(far.max()) == 255


def test_the_sign_of_a_zero_is_a_change() -> None:
    """Python holds both zeros for equal; what is divided by them is not."""

    @dataclass(frozen=True)
    class Flips(Pass):
        name: ClassVar[str] = "flips"
        phase: ClassVar[str] = "fuse"

    text = """
    program "p" phase captured {{
      symbol T: 1..64
      input %x: f32[T, 8]
      %0 = div(%x, {zero}) : f32[T, 8]
      output %0
    }}"""
    before, after = (parse_program(text.format(zero=zero)) for zero in ("0.0", "-0.0"))
    assert before != after
    assert parse_program(text.format(zero="nan")) == parse_program(text.format(zero="nan"))
    with pytest.raises(PassError, match="off by inf"):
        Verifier().check_pass(Flips(), before, after)
