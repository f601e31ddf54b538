"""Scaled channels: the same bits before anything is rounded, smaller errors after; and faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import PassError, UsageError
from infc.ir.interpret import Interpreter
from infc.ir.ops.quantized import quantize_rows_meaning, scaled_linear_meaning
from infc.ir.program import ModelSpec, Program, Value, WeightExpr, WeightRef
from infc.ir.schemes import get_scheme
from infc.ir.text import parse_program, print_program
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify
from infc.ir.weights import checkpoint, evaluate_weight
from infc.passes import verification
from infc.passes.base import PassContext, PassResult
from infc.passes.methods import scale_channels
from infc.passes.methods.calibration import Calibration
from infc.passes.methods.channel_scales import (
    Choice,
    Matrices,
    Windows,
    _powers_of_two,
    choose_scales,
    sampled,
    scale_logs,
)
from infc.passes.methods.scale_channels import ScaleChannels
from infc.passes.methods.spill import SpillFile
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import build_pipeline
from infc.passes.samples import with_random_weights

from ..test_cut_runs import VOCAB, stack

WINDOWS = tuple(
    tuple(torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (40, 40, 23, 31)
)


@pytest.fixture
def spills(tmp_path: Path) -> Iterator[Callable[[], SpillFile]]:
    """Makes spill files, which are closed afterwards."""
    made: list[SpillFile] = []

    def make() -> SpillFile:
        made.append(SpillFile(tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.close()


def scaled(program: Program, spill: SpillFile, **options: object) -> PassResult:
    calibration = Calibration(WINDOWS, spill, {"name": "random"})
    options = {"method": "awq", "scheme": "int4", **options}
    return ScaleChannels(**options).run(program, PassContext(calibration=calibration))  # type: ignore[arg-type]


def with_outliers(program: Program, *, has_rows: bool = True) -> Program:
    """Random weights, whose norms (and rows) make some channels far larger than others."""
    program = with_random_weights(program)
    read = program.loaders["checkpoint"]

    def spread(name: str) -> torch.Tensor:
        tensor = read(name).clone()
        if tensor.ndim == 1 or (has_rows and name.endswith((".v", ".up"))):
            tensor[::7] *= 30
        return tensor

    program.loaders["checkpoint"] = spread  # type: ignore[index]
    return program


def logits(program: Program, wide: str = "f32") -> torch.Tensor:
    places = torch.arange(40)
    inputs = {
        "input_ids": torch.tensor(WINDOWS[0]),
        "positions": places,
        "logits_index": places,
    }
    names = {value.name for value in program.inputs}
    run = Interpreter(program, lambda name: evaluate_weight(program, name), dtype_override=wide)
    return run.run({name: x for name, x in inputs.items() if name in names})[0]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_the_program_computes_the_same_bits(method: str, spills: Callable[[], SpillFile]) -> None:
    before = with_outliers(stack())
    text = print_program(before)
    result = scaled(before, spills(), method=method)
    after = result.program
    assert print_program(before) == text
    verify(after)
    assert parse_program(print_program(after)) == after
    assert result.matches > 8
    for wide in ("f32", "f64"):
        assert torch.equal(logits(before, wide), logits(after, wide))
    changed = {name for name in after.weights if after.weights[name] != before.weights[name]}
    assert {name.rpartition(".")[2] for name in changed} == {
        "norm1", "norm2", "q", "k", "v", "o", "gate", "up", "down",
    }  # fmt: skip
    again = scaled(after, spills(), method=method)
    assert again.matches == 0
    assert again.program is after


@pytest.mark.parametrize("layout", ["grouped", "fused"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_whatever_scales_are_chosen_no_bit_changes(layout: str, seed: int) -> None:
    """Also where several heads of queries share one of values, and rows are parts of others.

    And where several groups divide parts of the same weight.
    """
    before = with_outliers(grouped_heads() if layout == "grouped" else fused_matrices())
    generator = torch.Generator().manual_seed(seed)

    def any_scales(*of: object) -> Choice:
        classes = of[2]
        assert isinstance(classes, torch.Tensor)
        logs = 8 * torch.randn(len(classes), generator=generator)
        return Choice(_powers_of_two(logs, classes), 1.0, 1.0, 0.5)

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as directory:
        patch.setattr(scale_channels, "choose_scales", any_scales)
        spill = SpillFile(Path(directory))
        result = scaled(before, spill)
        assert result.matches == (4 if layout == "grouped" else 5)
        assert torch.equal(logits(before), logits(result.program))
        spill.close()


def grouped_heads(extra: str = "") -> Program:
    """A layer with four heads of queries and two of values; gate and up are rows of one matrix.

    `extra` adds what should keep the channels of its first norm as they are.
    """
    b = ProgramBuilder("grouped", ModelSpec("grouped", 1, 32, 4, 2, 8, VOCAB, 64))
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))

    def weight(name: str, *shape: int) -> WeightRef:
        return b.weight(name, TensorType(DType.F32, shape))

    x = b.emit("embedding", weight("embed", VOCAB, 32), ids)
    b.layer = 0
    norm = weight("norm1", 32)
    shift = norm if extra == "shift" else weight("shift1", 32)
    rows = b.emit("layer_norm", x, norm, shift, eps=1e-5)
    matrices = [weight("q", 32, 32), weight("k", 16, 32), weight("v", 16, 32)]
    if extra == "table":
        table = checkpoint("embed", TensorType(DType.F32, (VOCAB, 32)))
        part = WeightExpr("slice", (table,), {"dim": 0, "start": 0, "stop": 16})
        matrices[1] = b.weight("part", TensorType(DType.F32, (16, 32)), part)
    q, k, v = (b.emit("linear", rows, matrix) for matrix in matrices)
    heads = [
        b.emit("reshape", one, shape=("T", count, 8)) for one, count in ((q, 4), (k, 2), (v, 2))
    ]
    seen = b.emit("reshape", b.emit("attention", *heads, layer=0, scale=0.5), shape=("T", 32))
    x = b.emit("add", x, b.emit("linear", seen, weight("o", 32, 32), weight("o_bias", 32)))
    if extra == "reader":
        x = b.emit("add", x, rows)
    elif extra == "matrix":
        x = b.emit("add", x, b.emit("linear", x, matrices[0]))
    elif extra == "norm":
        x = b.emit("add", x, b.emit("layer_norm", x, norm, eps=1e-5))
    wide = b.emit("add", 1.0, weight("norm2", 32))
    mean = b.emit("mean", b.emit("mul", x, x), dims=(1,), keepdim=True)
    root = b.emit("rsqrt", b.emit("add", mean, 1e-5))
    normed = b.emit("mul", b.emit("mul", x, root), wide)
    both = b.emit("linear", normed, weight("gate_up", 96, 32), weight("gate_up_bias", 96))
    gate = b.emit("silu", b.emit("slice", both, dim=1, start=0, stop=48))
    hidden = b.emit("mul", gate, b.emit("slice", both, dim=1, start=48, stop=96))
    x = b.emit("add", x, b.emit("linear", hidden, weight("down", 32, 48)))
    b.layer = None
    made = b.emit("linear", x, weight("head", VOCAB, 32))
    b.output(made, *([rows] if extra == "output" else []))
    return b.build()


def fused_matrices(step: int = 1) -> Program:
    """A layer whose output projection and `down` read rows of one matrix; then parts of a norm.

    The vector of the norm is a weight of another shape. `step` is that of the rows of `up`.
    """
    b = ProgramBuilder("fused", ModelSpec("fused", 1, 32, 4, 2, 8, VOCAB, 64))
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))

    def weight(name: str, *shape: int) -> WeightRef:
        return b.weight(name, TensorType(DType.F32, shape))

    def part(x: Value, start: int, stop: int, step: int = 1) -> Value:
        return b.emit("slice", x, dim=1, start=start, stop=stop, step=step)

    x = b.emit("embedding", weight("embed", VOCAB, 32), ids)
    b.layer = 0
    rows = b.emit("layer_norm", x, weight("norm1", 32), weight("shift1", 32), eps=1e-5)
    fused = b.emit("linear", rows, weight("fused", 112 + 48 * step, 32))
    heads = [
        b.emit("reshape", part(fused, *ends), shape=("T", count, 8))
        for ends, count in (((0, 32), 4), ((32, 48), 2), ((48, 64), 2))
    ]
    seen = b.emit("reshape", b.emit("attention", *heads, layer=0, scale=0.5), shape=("T", 32))
    gate = b.emit("silu", part(fused, 64, 112))
    up = part(fused, 112, 112 + 48 * step, step)
    down = b.emit("linear", b.emit("mul", gate, up), weight("down", 32, 48))
    x = b.emit("add", x, b.emit("add", b.emit("linear", seen, weight("o", 32, 32)), down))
    wide = b.emit("reshape", weight("norm2", 1, 32), shape=(32,))
    mean = b.emit("mean", b.emit("mul", x, x), dims=(1,), keepdim=True)
    root = b.emit("rsqrt", b.emit("add", mean, 1e-5))
    rows = b.emit("mul", b.emit("mul", x, root), wide)
    halves = [part(rows, 0, 16), part(rows, 16, 32)]
    made = [
        b.emit("linear", half, weight(name, 32, 16))
        for half, name in zip(halves, ("first", "second"), strict=True)
    ]
    x = b.emit("add", x, b.emit("add", *made))
    b.layer = None
    b.output(b.emit("linear", x, weight("head", VOCAB, 32)))
    return b.build()


def test_channels_that_are_no_range_of_rows_stay(spills: Callable[[], SpillFile]) -> None:
    before = with_outliers(fused_matrices(step=2))
    result = scaled(before, spills())
    assert result.matches
    for name in ("o", "down"):
        assert result.program.weights[name] == before.weights[name]
    assert any("is no range of a row" in str(miss) for miss in result.near_misses)
    assert torch.equal(logits(before), logits(result.program))


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "q8_0-weights", "q4_1-weights"])
def test_rows_with_scales_in_float16_are_not_divided(
    scheme: str, spills: Callable[[], SpillFile]
) -> None:
    before = with_outliers(grouped_heads())
    result = scaled(before, spills(), scheme=scheme)
    assert result.matches == 2
    for name in ("o", "down"):
        assert result.program.weights[name] == before.weights[name]
    assert sum("too small a range" in str(miss) for miss in result.near_misses) == 2


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("reader", "add reads"),
        ("output", "is an output"),
        ("matrix", "@q is read elsewhere"),
        ("norm", "@norm1 is read elsewhere"),
        ("shift", "@norm1 is read twice"),
        ("table", "@part is a table as well"),
    ],
)
def test_rows_and_weights_that_something_else_reads_stay(
    extra: str, reason: str, spills: Callable[[], SpillFile]
) -> None:
    before = with_outliers(grouped_heads(extra))
    result = scaled(before, spills())
    for name in {"norm1", "shift1", "q"} & before.weights.keys():
        assert result.program.weights[name] == before.weights[name]
    assert any(reason in str(miss) for miss in result.near_misses), result.near_misses
    assert any("head" in str(miss) for miss in result.near_misses)


def test_what_is_not_quantised_is_scaled_with_the_rest_and_counts_for_nothing(
    spills: Callable[[], SpillFile],
) -> None:
    before = with_outliers(stack())
    result = scaled(before, spills(), scheme="none", rules="*.q=int4", skip="*.k")
    changed = {
        name.rpartition(".")[2]
        for name, weight in result.program.weights.items()
        if weight != before.weights[name]
    }
    assert changed == {"norm1", "q", "k", "v"}
    assert torch.equal(logits(before), logits(result.program))


def outliers(seed: int) -> torch.Tensor:
    """Rows of which some channels are far larger than the others."""
    x = torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(seed))
    x[..., ::9] *= 40
    return x


@pytest.mark.parametrize(
    ("method", "scheme"), [("smoothquant", "int8-token"), ("awq", "int4"), ("awq", "int4-token")]
)
def test_the_error_of_products_of_outliers_is_smaller(method: str, scheme: str) -> None:
    """By the ops' own meaning, on rows that scales were not chosen on."""
    weights = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) / 8
    how = get_scheme(scheme)
    matrices = Matrices([weights], [how], {})
    windows = Windows([outliers(1), outliers(2)], [outliers(3)])
    logs = scale_logs(method, 0.5, windows.fitted, weights.abs().amax(0))
    with ThreadPoolExecutor(1) as pool:
        choice = choose_scales(logs, matrices, torch.arange(64), windows, pool)
    scales = choice.scales
    assert scales is not None
    assert torch.equal(scales.log2(), scales.log2().round())
    assert choice.scaled_error < 0.7 * choice.plain_error

    rows = how.activations
    assert rows is not None

    def error(s: torch.Tensor) -> float:
        x = outliers(4)[0]
        codes = quantize_rows_meaning(x / s, rows.group)
        y = scaled_linear_meaning(*codes, *how.quantize(weights * s), dtype="f32", scheme=scheme)
        return float((y - x @ weights.T).square().sum())

    assert error(scales) < 0.7 * error(torch.ones(64))


@given(count=st.integers(1, 2000), share=st.integers(1, 40))
def test_a_sample_of_rows_is_evenly_spaced(count: int, share: int) -> None:
    """Whatever their number: from all of the matrix, and as many as wanted."""
    places = sampled(torch.arange(float(count))[:, None], share)[:, 0]
    assert len(places) == min(count, max(32, 512 // share))
    gaps = torch.diff(places, prepend=-torch.ones(1), append=torch.tensor([float(count)]))
    assert set(gaps.tolist()) <= {1, count // len(places), -(-count // len(places))}


def test_scales_that_do_not_help_on_windows_left_out_are_not_used() -> None:
    """Other channels are large there."""
    weights = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) / 8
    matrices = Matrices([weights], [get_scheme("int8-token")], {})
    windows = Windows([outliers(1)], [outliers(3).roll(4, -1)])
    logs = scale_logs("smoothquant", 1.0, windows.fitted, weights.abs().amax(0))
    with ThreadPoolExecutor(1) as pool:
        choice = choose_scales(logs, matrices, torch.arange(64), windows, pool)
    assert choice.scales is None
    assert choice.scaled_error >= choice.plain_error


def test_a_group_that_scales_do_not_help_stays_and_is_named(
    spills: Callable[[], SpillFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_channels, "choose_scales", lambda *_: Choice(None, 0.5, 1.0, 2.0))
    before = with_outliers(stack())
    result = scaled(before, spills())
    assert result.program is before
    assert sum("would not lower the error" in str(miss) for miss in result.near_misses) == 32
    assert not any(one["used"] for one in result.details["errors"])


def test_neither_threads_nor_time_show(
    spills: Callable[[], SpillFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for threads in (1, 3, 3):
        monkeypatch.setattr(scale_channels, "available_cpus", lambda count=threads: count)
        after = scaled(with_outliers(stack((None, 4))), spills())
        weights = {
            name: evaluate_weight(after.program, weight)
            for name, weight in after.program.weights.items()
        }
        found.append((weights, after.details))
    for weights, details in found[1:]:
        assert details == found[0][1]
        assert all(torch.equal(weights[name], found[0][0][name]) for name in weights)


@pytest.mark.parametrize("is_heavy", [False, True])
def test_a_pipeline_with_it_is_verified(
    is_heavy: bool,
    tmp_path: Path,
    spills: Callable[[], SpillFile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few layers alone take the scales of the whole model; and GPTQ works on scaled matrices."""
    if is_heavy:
        monkeypatch.setattr(verification, "HEAVY_FLOPS", 0)
    runs = []
    plain = scale_channels._Search.run

    def counted(self: scale_channels._Search) -> None:
        runs.append(1)
        plain(self)

    monkeypatch.setattr(scale_channels._Search, "run", counted)
    said: list[tuple[int, int, str]] = []
    calibration = Calibration(WINDOWS, spills(), advance=lambda *what: said.append(what))
    pipeline = build_pipeline(
        {
            "scale-channels": {"scheme": "int4", "method": "awq"},
            "quantize-weights": {"scheme": "int4"},
            "calibrate-weights": {"method": "gptq"},
        }
    )
    _, report = run_pipeline(
        with_outliers(stack((None, 4, 4, 4) if is_heavy else (None,)), has_rows=False),
        pipeline,
        PassContext(calibration=calibration),
        failure_directory=tmp_path,
    )
    assert runs == [1]
    data = {one["name"]: one for one in report.as_data()["passes"]}["scale-channels"]
    assert data["matches"] > 0
    assert "distinct ones run" in data["verified"]
    assert len(data["details"]["errors"]) == (16 if is_heavy else 4)
    own = [one for one in said if one[2].startswith("scaling channels of layer 0 on 134 tokens")]
    assert own[0][0] == 0
    done = [one[0] for one in said if "scaling" in one[2]]
    assert done == sorted(done)
    assert said[len(done) - 1][0] == said[len(done) - 1][1]


def test_inputs_that_are_not_finite_are_an_error_with_the_layer(
    spills: Callable[[], SpillFile],
) -> None:
    program = with_outliers(stack())
    read = program.loaders["checkpoint"]

    def spoilt(name: str) -> torch.Tensor:
        return torch.full_like(read(name), 1e38) if name == "layers.3.norm2" else read(name)

    bad = replace(program, loaders={**program.loaders, "checkpoint": spoilt})
    with pytest.raises(PassError, match=r"linear of layer 3 .*NaN or infinity"):
        scaled(bad, spills())


def test_errors_that_no_number_holds_are_text_in_the_report(
    spills: Callable[[], SpillFile],
) -> None:
    """JSON has neither infinity nor NaN. Where errors are not known, nothing is scaled."""
    program = with_outliers(stack())
    read = program.loaders["checkpoint"]

    def huge(name: str) -> torch.Tensor:
        return torch.full_like(read(name), 3e37) if name == "layers.7.down" else read(name)

    program = replace(program, loaders={**program.loaders, "checkpoint": huge})
    details = scaled(program, spills()).details
    assert details is not None
    json.dumps(details, allow_nan=False)
    (found,) = (one for one in details["errors"] if one["matrices"] == ["layers.7.down"])
    assert found["scaled"] in ("nan", "inf")
    assert not found["used"]


def test_what_is_no_step_of_a_model_is_refused(spills: Callable[[], SpillFile]) -> None:
    program = with_outliers(stack())
    other = replace(program, inputs=(*program.inputs, Value("x", TensorType(DType.F32, (1,)))))
    with pytest.raises(PassError, match="not a model's step"):
        scaled(other, spills())
    context = PassContext(calibration=Calibration((), spills()))
    with pytest.raises(PassError, match="no calibration tokens"):
        ScaleChannels(scheme="int4", method="awq").run(program, context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awk"}, "unknown method awk"),
        ({"exponent": 1.5}, "exponent is 1.5, expected 0 to 1"),
        ({"exponent": float("nan")}, "exponent is nan"),
        ({"method": "awq", "exponent": 0.7}, "exponent has no effect with method awq"),
        ({"method": "auto", "exponent": 0.7}, "exponent has no effect with method auto"),
        ({"exponent": 0.7}, "exponent has no effect with method none"),
        ({"method": "awq"}, "method awq needs a calibration text"),
        ({"method": "awq", "scheme": "int3"}, "unknown scheme int3"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    one = ScaleChannels(**{"scheme": "int4", **options})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        one.run(with_random_weights(stack()), PassContext())
