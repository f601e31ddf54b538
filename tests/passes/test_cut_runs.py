"""Whole runs of models too large to run whole: a few layers and the head, through all passes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import PassError
from infc.ir.program import ModelSpec, Node, Operand, Program, Value
from infc.ir.quantized_pairs import QuantizedPairs
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify
from infc.passes import cut_runs, sample_runs, verification, whole_runs
from infc.passes.base import Pass, PassContext, PassResult
from infc.passes.compare import difference, distance
from infc.passes.cut_program import MAX_KINDS, choose_layers, cut_program, layer_keys, layers_of
from infc.passes.pass_manager import run_passes, run_pipeline
from infc.passes.pass_report import PipelineReport
from infc.passes.pipeline import Pipeline, build_pipeline
from infc.passes.sample_runs import run_whole
from infc.passes.samples import with_random_weights

from ..plans import PLAN

WIDTH, HEADS, VOCAB = 8, 2, 16
WINDOWS = (None, 4, 4, None, 4, 4, None, 4)


def stack(windows: Sequence[int | None] = WINDOWS, scales: Sequence[float] = ()) -> Program:
    """A decoder whose layers differ in their windows (and in a constant each, if given)."""
    count = len(windows)
    spec = ModelSpec("stack", count, WIDTH, HEADS, HEADS, WIDTH // HEADS, VOCAB, 64, tuple(windows))
    b = ProgramBuilder("stack", spec)
    b.symbol("T", 1, 64)
    b.symbol("R", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    b.input("positions", TensorType(DType.I64, (Sym("T"),)))
    index = b.input("logits_index", TensorType(DType.I64, (Sym("R"),)))
    x = b.emit("embedding", b.weight("embed", TensorType(DType.F32, (VOCAB, WIDTH))), ids)
    for layer, window in enumerate(windows):
        b.layer = layer
        x = _attention(b, x, layer, window)
        x = _feed_forward(b, x, layer, scales[layer] if scales else 1.5)
    b.layer, b.source = None, "lm_head"
    rows = b.emit("take", x, index, dim=0)
    b.output(b.emit("linear", rows, b.weight("head", TensorType(DType.F32, (VOCAB, WIDTH)))))
    return b.build()


def _linear(b: ProgramBuilder, x: Value, layer: int, name: str) -> Value:
    b.source = f"model.layers.{layer}.{name}"
    kind = TensorType(DType.F32, (WIDTH, WIDTH))
    return b.emit("linear", x, b.weight(f"layers.{layer}.{name}", kind))


def _norm(b: ProgramBuilder, x: Value, layer: int, name: str) -> Value:
    b.source = f"model.layers.{layer}.{name}"
    weight = b.weight(f"layers.{layer}.{name}", TensorType(DType.F32, (WIDTH,)))
    return b.emit("rms_norm", x, weight, eps=1e-5)


def _attention(b: ProgramBuilder, x: Value, layer: int, window: int | None) -> Value:
    normed = _norm(b, x, layer, "norm1")
    heads = [
        b.emit("reshape", _linear(b, normed, layer, name), shape=("T", HEADS, WIDTH // HEADS))
        for name in ("q", "k", "v")
    ]
    b.source = f"model.layers.{layer}.attn"
    seen = b.emit("attention", *heads, layer=layer, scale=0.5, window=window)
    b.source = f"model.layers.{layer}"
    return b.emit("add", x, _linear(b, b.emit("reshape", seen, shape=("T", WIDTH)), layer, "o"))


def _feed_forward(b: ProgramBuilder, x: Value, layer: int, scale: float) -> Value:
    normed = _norm(b, x, layer, "norm2")
    gate, up = (_linear(b, normed, layer, name) for name in ("gate", "up"))
    down = _linear(b, b.emit("mul", b.emit("silu", gate), up), layer, "down")
    b.source = f"model.layers.{layer}"
    return b.emit("mul", b.emit("add", x, down), scale)


def test_the_first_layer_of_each_kind_and_the_last_are_kept() -> None:
    program = stack()
    keys = layer_keys(program)
    assert keys[1] == keys[2] == keys[4] == keys[7]
    assert keys[3] == keys[6] != keys[1]
    assert choose_layers(program) == [0, 1, 3, 7]
    cut = cut_program(program, [0, 1, 3, 7])
    assert isinstance(cut, Program)
    verify(cut)
    assert layers_of(cut) == [0, 1, 3, 7]
    known = layer_keys(cut)
    assert all(known[layer] == keys[layer] for layer in (None, 0, 1, 3, 7))


def test_layers_that_all_differ_are_kept_up_to_a_number() -> None:
    windows = [4] * 20
    program = stack(windows, [1 + layer / 100 for layer in range(20)])
    assert choose_layers(program) == [*range(MAX_KINDS), 19]


def test_a_weight_of_another_layer_is_another_kind() -> None:
    program = stack([None] * 6)
    assert choose_layers(program) == [0, 1, 5]
    wrong = replace(program.weights["layers.3.up"], expr=program.weights["layers.2.up"].expr)
    other = replace(program, weights={**program.weights, "layers.3.up": wrong})
    assert choose_layers(program, other) == [0, 1, 3, 5]


def test_what_a_lost_layer_alone_has_cannot_be_cut() -> None:
    program = stack([None] * 4)
    node = next(n for n in program.nodes if n.op == "silu" and n.layer == 2)
    lone = replace(node, op="exp", attrs={})
    nodes = tuple(
        lone if n is node else _reading(n, lone.output) if n.layer == 3 and n.op == "silu" else n
        for n in program.nodes
    )
    reason = cut_program(program.with_nodes(nodes), [0, 1, 3])
    assert isinstance(reason, str)
    assert "of layer 2 alone" in reason


def _reading(node: Node, value: Value) -> Node:
    return replace(node, inputs=(value,))


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program counts as one that is too large to run."""
    monkeypatch.setattr(verification, "HEAVY_FLOPS", 0)


def through(program: Program, spec: object, directory: Path, *added: Pass) -> PipelineReport:
    pipeline = build_pipeline(spec, plan=PLAN)  # type: ignore[arg-type]
    for one in added:
        pipeline = pipeline.placed(one)
    _, report = run_pipeline(
        with_random_weights(program), pipeline, failure_directory=directory, context=PassContext()
    )
    return report


@pytest.fixture
def too_large(heavy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program counts as one of which nothing but a cut one is run."""
    monkeypatch.setattr(cut_runs, "MAX_FLOPS", 0)


@pytest.mark.usefixtures("heavy")
def test_a_large_model_is_run_through_paged_steps(tmp_path: Path) -> None:
    report = through(stack(), None, tmp_path)
    assert report.phases == [
        "lower-kv: 3 paged steps of 2 sequences agree with a whole run "
        "(layers 0, 1, 3, 7 of 8 and the head)",
        "plan: nothing changed since the last comparison",
        "each of the 8 layers is equal to one that ran",
    ]


@pytest.mark.usefixtures("heavy")
def test_the_loss_of_a_large_model_is_measured(tmp_path: Path) -> None:
    report = through(stack(), {"quantize-weights": {"scheme": "int8"}}, tmp_path)
    data = next(one for one in report.as_data()["passes"] if one["name"] == "quantize-weights")
    assert 0 < data["distance"]["kl"] < 1
    assert 0 < data["distance"]["error"] < 1
    assert data["distance"]["rows"] == 37
    assert data["distance"]["what"] == "layers 0, 1, 3, 7 of 8 and the head"
    assert "agree with a whole run of the result of quantize-weights" in report.phases[0]
    again = through(stack(), {"quantize-weights": {"scheme": "int8"}}, tmp_path)
    assert again.as_data() == report.as_data()


@pytest.mark.usefixtures("heavy")
def test_a_rule_for_a_layer_that_is_not_run_is_of_use(tmp_path: Path) -> None:
    """Layers 4 and 5 are of one kind: the second is left out, and its rule has been used before."""
    rules = {"scheme": "int8", "rules": "layers.4.up=q8_0 layers.5.up=q8_0"}
    report = through(stack(), {"quantize-weights": rules}, tmp_path)
    data = next(one for one in report.as_data()["passes"] if one["name"] == "quantize-weights")
    assert data["distance"]["what"] == "layers 0, 1, 3, 4, 7 of 8 and the head"


@dataclass(frozen=True)
class Edit(Pass):
    """Changes nodes of one op in one layer, as a faulty pass does."""

    op: str = "paged_attention"
    layer: int | None = 5
    change: Callable[[Node], Node] = lambda node: replace(node, attrs={**node.attrs, "scale": 0.6})

    name: ClassVar[str] = "edit"
    phase: ClassVar[str] = "lower-kv"

    def run(self, program: Program, context: PassContext) -> PassResult:
        nodes = tuple(
            self.change(node) if node.op == self.op and node.layer == self.layer else node
            for node in program.nodes
        )
        changed = program.with_nodes(nodes)
        return PassResult(program) if changed == program else PassResult(changed, 1)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("layer", [0, 5, 7])
def test_a_fault_in_the_state_of_one_layer_is_seen(layer: int, tmp_path: Path) -> None:
    """No region sees paged state, and no other layer has that fault."""
    with pytest.raises(
        PassError, match=r"logits of paged steps .* off by .*\(layers .* the head\)"
    ):
        through(stack(), None, tmp_path, Edit(layer=layer))


@pytest.mark.usefixtures("heavy")
def test_a_fault_in_the_head_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head is too large for regions."""
    monkeypatch.setattr(verification, "MAX_REGION_ELEMENTS", 1)
    monkeypatch.setattr(sample_runs, "SPLIT_ELEMENTS", 24)

    def other_rows(node: Node) -> Node:
        return replace(node, inputs=(node.inputs[0], *Edited.refs))

    class Edited(Edit):
        refs: ClassVar[tuple[Operand, ...]] = ()

        def run(self, program: Program, context: PassContext) -> PassResult:
            embed = next(n for n in program.nodes if n.op == "embedding").inputs[0]
            type(self).refs = (embed,)
            return super().run(program, context)

    edit = Edited(op="linear", layer=None, change=other_rows)
    with pytest.raises(PassError, match="logits of paged steps"):
        through(stack(), None, tmp_path, edit)


@dataclass(frozen=True)
class NeedsLayerTwo(Pass):
    """A pass that takes a layer for granted."""

    name: ClassVar[str] = "needs-two"
    phase: ClassVar[str] = "fuse"

    def run(self, program: Program, context: PassContext) -> PassResult:
        assert 2 in layers_of(program), "no layer 2"
        return PassResult(program)


@dataclass(frozen=True)
class ExitsWithoutLayerTwo(NeedsLayerTwo):
    """One that would end the process."""

    name: ClassVar[str] = "exits"

    def run(self, program: Program, context: PassContext) -> PassResult:
        if 2 not in layers_of(program):
            sys.exit(0)
        return PassResult(program)


@pytest.mark.usefixtures("too_large")
def test_a_pass_that_exits_on_few_layers_is_told(tmp_path: Path) -> None:
    (line,) = through(stack(), None, tmp_path, ExitsWithoutLayerTwo()).phases
    assert "a pass fails on layers 0, 1, 3, 7 of 8" in line
    assert "SystemExit: 0" in line


@pytest.mark.usefixtures("too_large")
def test_a_pass_that_fails_on_few_layers_is_told(tmp_path: Path) -> None:
    report = through(stack(), None, tmp_path, NeedsLayerTwo())
    (line,) = report.phases
    assert line.startswith("not compared as a whole, a pass fails on layers 0, 1, 3, 7 of 8")
    assert "no layer 2" in line


WHOLE = [
    "lower-kv: 3 paged steps of 2 sequences agree with a whole run",
    "plan: nothing changed since the last comparison",
]


@pytest.mark.usefixtures("heavy")
def test_where_few_layers_cannot_run_all_do_if_that_is_not_too_long(tmp_path: Path) -> None:
    report = through(stack(), None, tmp_path, NeedsLayerTwo())
    assert report.phases == [*WHOLE, "each of the 8 layers is equal to one that ran"]


def many_kinds() -> Program:
    return stack([4] * 12, [1 + layer / 100 for layer in range(12)])


@pytest.mark.usefixtures("heavy")
def test_a_fault_in_one_of_many_kinds_of_layers_is_seen(tmp_path: Path) -> None:
    report = through(many_kinds(), None, tmp_path)
    assert report.phases == [*WHOLE, "each of the 12 layers is equal to one that ran"]
    with pytest.raises(PassError, match="logits of paged steps"):
        through(many_kinds(), None, tmp_path, Edit(layer=10))


@pytest.mark.usefixtures("too_large")
def test_layers_of_too_many_kinds_are_named(tmp_path: Path) -> None:
    report = through(many_kinds(), None, tmp_path)
    assert "(layers 0, 1, 2, 3, 4, 5, 6, 7, 11 of 12 and the head)" in report.phases[0]
    assert report.phases[-1].startswith("layers 8, 9, 10 are unlike any that ran")


@pytest.mark.usefixtures("heavy")
def test_no_passes_compare_nothing() -> None:
    program = with_random_weights(stack())
    _, report = run_passes(program, Pipeline(()), verify=True)
    assert report.phases == []


class Spoils(Edit):
    """A lossy pass whose constant is out of all measure."""

    contract: ClassVar[str] = "lossy"
    allowed_error: ClassVar[float] = 1e30


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_lossy_pass_must_leave_numbers(value: float, tmp_path: Path) -> None:
    def spoil(node: Node) -> Node:
        return replace(node, inputs=(node.inputs[0], value))

    edit = Spoils(op="mul", layer=7, change=spoil)
    with pytest.raises(PassError):
        through(stack(), None, tmp_path, edit)


def test_a_distance_may_be_infinite_but_is_data() -> None:
    before = torch.tensor([[0.0, 1.0, -math.inf], [1.0, 0.0, 0.0]])
    assert distance(before, before, "it").kl == 0
    banned = before.clone()
    banned[1, 0] = -math.inf
    found = distance(before, banned, "it")
    assert found.kl == math.inf
    assert json.loads(json.dumps(found.as_data(), allow_nan=False))["kl"] == "inf"


@pytest.mark.usefixtures("too_large")
def test_a_run_that_takes_too_long_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_runs, "MAX_CUT_FLOPS", 1)
    (line,) = through(stack(), None, tmp_path).phases
    assert line.startswith("not compared as a whole, a run of layers 0, 1, 3, 7 of 8 and the head")


def test_matrices_in_parts_are_the_same_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    program = with_random_weights(stack())
    rows = (3, 36)
    (whole,) = run_whole(program, QuantizedPairs(), 37, rows)
    monkeypatch.setattr(sample_runs, "SPLIT_ELEMENTS", 24)
    split = sample_runs.split_matrices(program)
    assert sum(node.op == "concat" for node in split.nodes) == 8 * 7 + 1
    verify(split)
    (parts,) = run_whole(program, QuantizedPairs(), 37, rows)
    assert difference(whole, parts).error < 1e-5


def test_weights_that_would_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole_runs.not_runnable(stack()) is None
    monkeypatch.setattr(whole_runs, "MAX_WEIGHT_ELEMENTS", 100)
    assert whole_runs.not_runnable(stack()) == "@head takes 512 B in float32"


def test_small_models_run_whole(tmp_path: Path) -> None:
    report = through(stack(), None, tmp_path)
    assert "lower-kv: 3 paged steps of 2 sequences agree with a whole run" in report.phases
