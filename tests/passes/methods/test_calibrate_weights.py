"""Calibrated weights of whole programs: what they are made from, by how many threads; faults."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import PassError, UsageError
from infc.ir.interpret import Interpreter
from infc.ir.program import ModelSpec, Program, Value
from infc.ir.quantized_pairs import QuantizedPairs
from infc.ir.schemes import get_scheme
from infc.ir.text import parse_program, print_program
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify
from infc.ir.weights import evaluate_weight
from infc.passes import verification
from infc.passes.base import PassContext, PassResult
from infc.passes.methods import calibrate_weights, expert_feedback, gptq
from infc.passes.methods.calibrate_weights import CalibrateWeights
from infc.passes.methods.calibration import Calibration
from infc.passes.methods.correction import Drift, correct
from infc.passes.methods.expert_feedback import hidden_rows, round_expert, routed
from infc.passes.methods.feedback import Factor, Rounded, factorize, feed_back
from infc.passes.methods.gptq import Gptq, decoded
from infc.passes.methods.grids import GRIDS
from infc.passes.methods.hessians import hessian
from infc.passes.methods.quantized_matrices import plain_program
from infc.passes.methods.spill import SpillFile
from infc.passes.pass_manager import run_pipeline
from infc.passes.pass_report import PipelineReport
from infc.passes.pipeline import build_pipeline
from infc.passes.quantize_weights import QuantizeWeights
from infc.passes.samples import with_random_weights
from infc.passes.whole_runs import WholeRuns

from ..test_cut_runs import VOCAB, stack

WINDOWS = tuple(
    tuple(torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (40, 40, 23)
)
GPTQ = CalibrateWeights(method="gptq")
DAMPING = GPTQ.damping


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


def quantized(scheme: str = "int4", program: Program | None = None, **options: object) -> Program:
    program = with_random_weights(program or stack())
    result = QuantizeWeights(scheme=scheme, **options).run(program, PassContext())  # type: ignore[arg-type]
    return result.program


def calibrated(program: Program, spill: SpillFile, **context: object) -> PassResult:
    calibration = Calibration(WINDOWS, spill, {"name": "random", "sha256": "00"})
    return GPTQ.run(program, PassContext(calibration=calibration, **context))  # type: ignore[arg-type]


def test_what_rows_are_multiplied_as_plays_no_part(spills: Callable[[], SpillFile]) -> None:
    """The same codes, whether rows are quantised or stay floats."""
    given = [quantized(scheme) for scheme in ("int4", "int4-weights")]
    assert "decoded_linear" in {node.op for node in given[1].nodes}
    first, second = (parts_of(calibrated(one, spills()).program) for one in given)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def parts_of(program: Program, op: str = "calibrated") -> dict[str, torch.Tensor]:
    made = [weight for weight in program.weights.values() if weight.expr.op == op]
    return {weight.name: evaluate_weight(program, weight) for weight in made}


@pytest.mark.parametrize("scheme", sorted(GRIDS))
def test_every_matrix_is_calibrated(scheme: str, spills: Callable[[], SpillFile]) -> None:
    before = quantized(scheme)
    text = print_program(before)
    result = calibrated(before, spills())
    after = result.program
    assert print_program(before) == text
    verify(after)
    assert parse_program(print_program(after)) == after
    assert after.nodes == before.nodes
    changed = {name for name in after.weights if after.weights[name] != before.weights[name]}
    parts = {name for name in before.weights if name.endswith((".codes", ".scales"))}
    assert changed == parts - {"embed.codes", "embed.scales"}
    assert changed == parts_of(after).keys()
    assert result.matches == len(changed) // 2 == 8 * 7 + 1
    again = calibrated(after, spills())
    assert again.matches == 0
    assert again.program is after
    errors = result.details["errors"]
    assert len(errors) == result.matches
    assert all(0 < one["gptq"] <= one["nearest"] < 1 for one in errors)
    assert sum(one["gptq"] for one in errors) < 0.85 * sum(one["nearest"] for one in errors)
    assert result.details["calibration"] == {
        "name": "random",
        "sha256": "00",
        "tokens": 103,
        "windows": 3,
        "damping": DAMPING,
        "correction": 0.5,
    }


def test_neither_threads_nor_time_show(
    spills: Callable[[], SpillFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for threads in (1, 3, 3):
        monkeypatch.setattr(calibrate_weights, "available_cpus", lambda count=threads: count)
        results.append(calibrated(quantized(), spills()))
    found = [parts_of(one.program) for one in results]
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(found[0][name], other[name]) for name in other)
    assert results[0].details == results[1].details


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_inputs_come_from_what_was_quantised_before(
    correction: float, spills: Callable[[], SpillFile]
) -> None:
    """Of the final program: whatever is before a product is what its codes were made on, and what
    the source model has there is what they were moved towards."""
    unquantized = with_random_weights(stack())
    method = CalibrateWeights(method="gptq", correction=correction)
    context = PassContext(calibration=Calibration(WINDOWS, spills()))
    after = method.run(quantized(program=unquantized), context).program
    plain = plain_program(after)

    def weight(name: str) -> torch.Tensor:
        matrix = plain.matrices.get(name)
        if matrix is None:
            return evaluate_weight(after, name)
        parts = {part: evaluate_weight(after, entry) for part, entry in matrix.parts.items()}
        return decoded("int4", parts, int(plain.program.weights[name].type.shape[-1]))  # type: ignore[arg-type]

    def source(name: str) -> torch.Tensor:
        if name not in plain.matrices:  # tables stay in codes in the source model too
            return evaluate_weight(after, name)
        return evaluate_weight(unquantized, name.removesuffix(".codes.plain"))

    groups: dict[str, list[str]] = {}
    for name, matrix in plain.matrices.items():
        assert matrix.input is not None
        groups.setdefault(matrix.input.name, []).append(name)
    inputs, exact = (inputs_of(plain.program, read, frozenset(groups)) for read in (weight, source))
    with ThreadPoolExecutor(1) as pool:
        for value, names in groups.items():
            drift = Drift(exact[value], inputs[value])
            moments = hessian(inputs[value], pool)
            factor = factorize(moments, DAMPING)
            sources = [source(name) for name in names]
            if correction and not drift.is_zero:
                found = correct(sources, drift, moments, correction, pool)
                assert found is not None
                sources = [found.of(i, one) for i, one in enumerate(sources)]
            for name, one in zip(names, sources, strict=True):
                expected = feed_back(one, factor, GRIDS["int4"])
                for part, entry in plain.matrices[name].parts.items():
                    assert torch.equal(evaluate_weight(after, entry), expected.parts[part]), entry


def inputs_of(
    program: Program, weight: Callable[[str], torch.Tensor], keep: frozenset[str]
) -> dict[str, list[torch.Tensor]]:
    """The values of these names in every window."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in keep}
    for window in WINDOWS:
        places = torch.arange(len(window))
        run = Interpreter(program, weight, keep=keep)
        given = {"input_ids": torch.tensor(window), "positions": places, "logits_index": places}
        run.run({value.name: given[value.name] for value in program.inputs})
        for name in keep:
            found[name].append(run.values[name])
    return found


def test_matrices_that_are_left_out_stay(spills: Callable[[], SpillFile]) -> None:
    after = calibrated(quantized(skip="*.up layers.2.*", head="none"), spills()).program
    made = {name.rpartition(".")[0] for name in parts_of(after)}
    assert made == {
        f"layers.{layer}.{name}"
        for layer in range(8)
        for name in ("q", "k", "v", "o", "gate", "down")
        if layer != 2
    }


def mixture() -> Program:
    """A projection, then two experts, then a head."""
    b = ProgramBuilder("mixture", ModelSpec("mixture", 1, 32, 1, 1, 32, VOCAB, 64))
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))

    def weight(name: str, *shape: int) -> object:
        return b.weight(name, TensorType(DType.F32, shape))

    x = b.emit("embedding", weight("embed", VOCAB, 32), ids)  # type: ignore[arg-type]
    x = b.emit("linear", x, weight("up", 32, 32))  # type: ignore[arg-type]
    scores = b.emit("linear", x, weight("router", 2, 32))  # type: ignore[arg-type]
    top = b.add("topk", (scores,), {"k": 1})
    x = b.emit(
        "moe", x, top.outputs[1], top.outputs[0], weight("gate_up", 2, 64, 32),  # type: ignore[arg-type]
        weight("down", 2, 32, 32), act="silu",  # type: ignore[arg-type]
    )  # fmt: skip
    b.output(b.emit("linear", x, weight("head", VOCAB, 32)))  # type: ignore[arg-type]
    return b.build()


def experts_of(program: Program, matrix: str) -> torch.Tensor:
    parts = {part: evaluate_weight(program, f"{matrix}.{part}") for part in ("codes", "scales")}
    return decoded("int4", parts, 32)


def test_each_expert_is_calibrated_on_the_rows_that_are_routed_to_it(
    spills: Callable[[], SpillFile],
) -> None:
    program = narrow_inputs(mixture())
    before = quantized(program=program)
    result = calibrated(before, spills())
    after = result.program
    made = {name.rpartition(".")[0] for name in parts_of(after)}
    assert made == {"up", "gate_up", "down", "head"}
    records = {one["matrix"]: one for one in result.details["errors"]}
    assert all(records[name]["nearest_experts"] == 0 for name in ("gate_up", "down"))
    assert all(records[name]["gptq"] < records[name]["nearest"] for name in ("gate_up", "down"))
    plain = plain_program(after)
    node = next(one for one in plain.program.nodes if one.op == "moe")

    def weight(name: str) -> torch.Tensor:
        entry = name.removesuffix(".codes.plain")
        return experts_of(after, entry) if name in plain.matrices else evaluate_weight(after, name)

    names = [value.name for value in node.inputs[:2] if isinstance(value, Value)]
    found = inputs_of(plain.program, weight, frozenset(names))
    for expert in range(2):
        rows = routed(found[names[0]], found[names[1]], expert)
        assert len(rows) > 32
        into = experts_of(after, "gate_up")[expert]
        for name, x in (("gate_up", rows), ("down", hidden_rows(node, rows, into, None))):
            is_held = torch.arange(len(x)) % 4 == 3
            with ThreadPoolExecutor(1) as pool:
                factor = factorize(hessian([x[~is_held]], pool), DAMPING)
            source = evaluate_weight(program, name)[expert]
            expected = feed_back(source, factor, GRIDS["int4"])
            for part, tensor in expected.parts.items():
                assert torch.equal(evaluate_weight(after, f"{name}.{part}")[expert], tensor)


def narrow_inputs(program: Program) -> Program:
    """With random weights, and rows that a few tokens tell all of: they lie in five dimensions."""
    program = with_random_weights(program)
    read = program.loaders["checkpoint"]

    def narrow(name: str) -> torch.Tensor:
        tensor = read(name)
        if name == "up":
            return tensor[:, :5] @ read("embed")[:5]
        return 3 * tensor if name == "gate_up" else tensor

    return replace(program, loaders={**program.loaders, "checkpoint": narrow})


def test_experts_that_few_tokens_reach_are_rounded_to_nearest_and_named(
    spills: Callable[[], SpillFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_feedback, "LEAST_ROWS", 104)
    before = quantized(program=narrow_inputs(mixture()))
    result = calibrated(before, spills())
    for name in ("gate_up", "down"):
        for part in ("codes", "scales"):
            entry = f"{name}.{part}"
            assert torch.equal(
                evaluate_weight(result.program, entry), evaluate_weight(before, entry)
            )
    assert [re.sub(r" are.*", "", str(miss)) for miss in result.near_misses] == [
        "@gate_up.codes: 2 of 2 experts",
        "@down.codes: 2 of 2 experts",
    ]


def test_feedback_that_does_not_help_on_rows_left_out_is_not_used() -> None:
    matrix, rows = torch.randn(104, 32, generator=torch.Generator().manual_seed(0)).split((64, 40))

    def rounded(one: torch.Tensor, factor: Factor) -> list[Rounded]:
        return [feed_back(one, factor, GRIDS["int4"])]

    def factor(x: torch.Tensor) -> Factor:
        with ThreadPoolExecutor(1) as pool:
            return factorize(hessian([x], pool), DAMPING)

    nearest = get_scheme("int4").quantize
    made = round_expert(matrix, rows, "int4", factor, rounded, nearest)
    assert not made.is_fed
    assert torch.equal(made.parts["codes"], nearest(matrix)[0])


def tied() -> Program:
    """A projection between a table of tokens and a head that is the same matrix."""
    b = ProgramBuilder("tied", ModelSpec("tied", 1, 32, 1, 1, 32, VOCAB, 64))
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    table = b.weight("embed", TensorType(DType.F32, (VOCAB, 32)))
    x = b.emit("embedding", table, ids)
    x = b.emit("linear", x, b.weight("up", TensorType(DType.F32, (32, 32))))
    b.output(b.emit("linear", x, table))
    return b.build()


def test_a_head_in_whose_codes_rows_are_looked_up_is_rounded_to_nearest(
    spills: Callable[[], SpillFile],
) -> None:
    result = calibrated(quantized(program=tied()), spills())
    assert {name.rpartition(".")[0] for name in parts_of(result.program)} == {"up"}
    (found,) = result.near_misses
    miss = str(found)
    assert miss.startswith("@embed.codes: rows are looked up in it")
    apart = quantized(program=tied(), embedding="int8")
    assert {"embed.codes", "embed.int4.codes"} <= apart.weights.keys()
    made = parts_of(calibrated(apart, spills()).program)
    assert {name.rpartition(".")[0] for name in made} == {"up", "embed.int4"}


def test_products_are_calibrated_on_the_rows_that_codes_stand_for(
    spills: Callable[[], SpillFile],
) -> None:
    before = quantized(program=tied(), head="int8")
    after = calibrated(before, spills()).program
    codes, scales = (evaluate_weight(before, f"embed.{part}") for part in ("codes", "scales"))
    rows = decoded("int8", {"codes": codes, "scales": scales}, 32)
    with ThreadPoolExecutor(1) as pool:
        factor = factorize(hessian([rows[list(one)] for one in WINDOWS], pool), DAMPING)
    expected = feed_back(evaluate_weight(with_random_weights(tied()), "up"), factor, GRIDS["int4"])
    assert torch.equal(evaluate_weight(after, "up.codes"), expected.parts["codes"])


def run(program: Program, directory: Path, spill: SpillFile) -> PipelineReport:
    calibration = Calibration(WINDOWS, spill)
    pipeline = build_pipeline(
        {"quantize-weights": {"scheme": "int4"}, "calibrate-weights": {"method": "gptq"}}
    )
    _, report = run_pipeline(
        with_random_weights(program),
        pipeline,
        PassContext(calibration=calibration),
        failure_directory=directory,
    )
    return report


@pytest.mark.parametrize("is_heavy", [False, True])
def test_a_pipeline_with_it_is_verified(
    is_heavy: bool,
    tmp_path: Path,
    spills: Callable[[], SpillFile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also a few layers alone, which take their weights from those of the whole model."""
    if is_heavy:
        monkeypatch.setattr(verification, "HEAVY_FLOPS", 0)
    runs = []
    plain = Gptq.run

    def counted(self: Gptq) -> None:
        runs.append(1)
        plain(self)

    monkeypatch.setattr(Gptq, "run", counted)
    program = stack((None, 4, 4, 4) if is_heavy else (None,))
    report = run(program, tmp_path, spills())
    assert runs == [1]
    (data,) = (one for one in report.as_data()["passes"] if one["name"] == "calibrate-weights")
    assert data["verified"] == "weights fitted to inputs, compared in whole runs"
    assert 0 < data["distance"]["kl"] < 10
    assert len(data["details"]["errors"]) == data["matches"]
    phases = "\n".join(report.phases)
    assert "agree with a whole run of the result of calibrate-weights" in phases
    assert run(program, tmp_path, spills()).as_data() == report.as_data()


def test_progress_goes_up_to_what_there_is_to_do(spills: Callable[[], SpillFile]) -> None:
    said: list[tuple[int, int, str]] = []
    calibration = Calibration(WINDOWS, spills(), advance=lambda *what: said.append(what))
    GPTQ.run(quantized(), PassContext(calibration=calibration))
    done = [one[0] for one in said]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == said[-1][1]
    assert {one[1] for one in said} == {said[0][1]}
    assert said[0][2] == "calibrating layer 0 on 103 tokens"
    assert any("head" in one[2] for one in said)


def test_inputs_that_are_not_finite_are_an_error_with_the_layer(
    spills: Callable[[], SpillFile],
) -> None:
    program = quantized()
    read = program.loaders["checkpoint"]

    def spoilt(name: str) -> torch.Tensor:
        return torch.full_like(read(name), 1e30) if name == "layers.3.norm2" else read(name)

    bad = replace(program, loaders={**program.loaders, "checkpoint": spoilt})
    with pytest.raises(PassError, match=r"linear of layer 3 .*NaN or infinity"):
        calibrated(bad, spills())


@pytest.mark.parametrize(
    ("value", "message"), [(1e6, "too large for q4_0"), (1e-9, "would become 0 for q4_0")]
)
def test_a_matrix_outside_of_the_range_of_its_format_is_named(
    value: float, message: str, spills: Callable[[], SpillFile]
) -> None:
    program = quantized("q4_0")
    read = program.loaders["checkpoint"]

    def spoilt(name: str) -> torch.Tensor:
        return torch.full_like(read(name), value) if name == "layers.2.down" else read(name)

    bad = replace(program, loaders={**program.loaders, "checkpoint": spoilt})
    named = rf"layers\.2\.down.*: its largest .*{message}"
    with pytest.raises(UsageError, match=named):
        calibrated(bad, spills())
    with pytest.raises(UsageError, match=named):
        parts_of(bad, "codes")
    plain, runs = with_random_weights(stack()), WholeRuns(QuantizedPairs())
    runs.start(plain)
    with pytest.raises(UsageError, match=f"^@{named}"):
        runs.rebase(plain, bad, "quantize-weights")


def test_codes_that_do_not_stand_for_the_rounded_values_are_an_error(
    spills: Callable[[], SpillFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "decoded", lambda *_: torch.zeros(()))
    with pytest.raises(PassError, match=r"^@.*: the codes do not stand for the rounded values"):
        calibrated(quantized(), spills())


def test_what_is_no_step_of_a_model_is_refused(spills: Callable[[], SpillFile]) -> None:
    program = quantized()
    other = replace(program, inputs=(*program.inputs, Value("x", TensorType(DType.F32, (1,)))))
    with pytest.raises(PassError, match="not a model's step"):
        calibrated(other, spills())
    with pytest.raises(PassError, match="no calibration tokens"):
        GPTQ.run(program, PassContext(calibration=Calibration((), spills())))


def test_a_higher_damping_is_said(
    spills: Callable[[], SpillFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from infc.passes.methods import gptq

    def harder(moments: torch.Tensor, damping: float) -> object:
        return factorize(moments, 10 * damping)

    monkeypatch.setattr(gptq, "factorize", harder)
    said: list[str] = []
    result = calibrated(quantized(), spills(), log=said.append)
    assert "%" in said[0]
    assert "layer 0" in said[0]
    assert "damping raised to 5" in said[0]
    assert all(one["damping"] == pytest.approx(5) for one in result.details["errors"])


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (CalibrateWeights(method="awk"), "unknown method awk"),
        (CalibrateWeights(method="gptq", damping=0.0), "damping is 0.0"),
        (CalibrateWeights(method="gptq", damping=float("nan")), "damping is nan"),
        (CalibrateWeights(method="gptq", correction=1.5), "correction is 1.5, expected 0 to 1"),
        (CalibrateWeights(method="gptq", correction=float("nan")), "correction is nan"),
        (GPTQ, "method gptq needs a calibration text"),
    ],
)
def test_options_that_cannot_be(one: CalibrateWeights, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        one.run(quantized(), PassContext())
