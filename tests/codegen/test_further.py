"""Programs that take and give other arrays than every step does, on both backends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from infc.codegen.cpp.toolchain import LibraryBuild
from infc.codegen.registry import get_backend
from infc.ir.artifact import Artifact, ArtifactWriter, open_artifact
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ArtifactError, CapacityError, InfcError, ProgramError
from infc.ir.program import Program, Value
from infc.ir.step_facts import check_step_facts, step_facts
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import Executor, ExecutorConfig, run_step
from infc.runtime.sampling.draws import DRAW
from infc.runtime.scheduling.step import Step

from ..ir.version_1 import take_back
from .harness import Chunk, build, make_step, open_cpp, random_weights, with_weights

WIDTH, ROWS, VOCABULARY = 24, 40, 10
"""No multiples of what a vector or a panel holds."""


def i64(*shape: Any) -> TensorType:
    return TensorType(DType.I64, tuple(shape))


def f32(*shape: Any) -> TensorType:
    return TensorType(DType.F32, tuple(shape))


def program(dtype: DType = DType.F32) -> Program:
    """`patches [P, WIDTH]`, of which `order [R]` names some: all squared, and logits of those."""
    b = ProgramBuilder("patches", phase="planned")
    b.symbol("P", 1, ROWS)
    b.symbol("R", 1, 16)
    patches = b.input("patches", f32(Sym("P"), WIDTH))
    order = b.input("order", i64(Sym("R")))
    square = b.emit("mul", patches, patches)
    chosen = b.emit("take", patches, order, dim=0)
    logits = b.emit("linear", chosen, b.weight("w", TensorType(dtype, (VOCABULARY, WIDTH))))
    b.output(square=square, logits=logits, chosen=chosen)
    return with_weights(b.build(), random_weights(b.build(), 3))


@pytest.fixture(scope="module", params=["cpp", "reference"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(program(), tmp_path_factory.mktemp("further") / "a", backend=request.param)


@pytest.fixture
def executor(artifact: Artifact) -> Iterator[Executor]:
    made = open_executor(artifact, ExecutorConfig(num_blocks=(), num_threads=2))
    yield made
    made.close()


def inputs(patches: int, order: list[int]) -> dict[str, Any]:
    random = np.random.default_rng(patches)
    rows = random.standard_normal((patches, WIDTH)).astype(np.float32)
    return {"patches": rows, "order": np.array(order, np.int32)}


def step(given: dict[str, Any], rows: int, draws: NDArray[Any] | None = None) -> Step:
    """A step without tokens, of so many rows."""
    none = np.zeros(0, np.int32)
    made = Step(
        token_ids=none,
        positions=none,
        query_starts=np.zeros(1, np.int32),
        context_lengths=none,
        block_tables=(),
        slots=(),
        block_copies=(),
        logits_index=np.arange(rows, dtype=np.int32),
        inputs=given,
    )
    return made if draws is None else replace(made, draws=draws)


@pytest.mark.parametrize(("patches", "order"), [(1, [0]), (ROWS, [39, 0, 7]), (17, [3] * 16)])
def test_arrays_come_and_go_by_name(
    executor: Executor, artifact: Artifact, patches: int, order: list[int]
) -> None:
    given = inputs(patches, order)
    draws = np.array([(0, 0.0, 1.0, 0.0, 0, len(order) - 1, 0, 0)], DRAW)
    output = run_step(executor, step(given, len(order), draws))
    weight = random_weights(program(), 3)["w"].numpy()
    chosen = given["patches"][order]
    expected = chosen.astype(np.float64) @ weight.T.astype(np.float64)
    assert list(output.others) == ["chosen", "square"]
    np.testing.assert_array_equal(output.others["chosen"], chosen)
    np.testing.assert_array_equal(output.others["square"], given["patches"] ** 2)
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-5)
    assert output.tokens.tolist() == [int(output.logits[-1].argmax())]
    # As the manifest says it.
    said = artifact.manifest.main
    assert said.inputs == {"patches": f"f32[P, {WIDTH}]", "order": "i32[R]"}
    assert said.outputs["square"] == f"f32[P, {WIDTH}]"
    assert said.limits.sizes == {"P": ROWS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("order"), "takes other inputs .*: order, patches, not patches"),
        (lambda g: g.update(more=g["order"]), "not more, order, patches"),
        (lambda g: g.update(order=g["order"].astype(np.int64)), "input order is int64, declared"),
        (lambda g: g.update(patches=g["patches"][:, :-1]), "input patches has shape"),
        (lambda g: g.update(patches=g["patches"].T.copy().T), "patches is not contiguous"),
        (lambda g: g.update(order=g["order"][:1]), "input order has R = 1, but R is 2"),
    ],
)
def test_other_arrays_are_refused(executor: Executor, change: Any, message: str) -> None:
    given = inputs(5, [1, 2])
    change(given)
    with pytest.raises(InfcError, match=message):
        run_step(executor, step(given, 2))


def test_sizes_beyond_what_was_compiled_are_refused(executor: Executor) -> None:
    with pytest.raises(CapacityError, match=f"P = {ROWS + 1}, and was compiled for {ROWS}"):
        run_step(executor, step(inputs(ROWS + 1, [0]), 1))
    with pytest.raises(CapacityError, match=r"17 rows|R = 17"):
        run_step(executor, step(inputs(2, [0] * 17), 17))


def test_no_manifest_says_otherwise_than_the_code(artifact: Artifact) -> None:
    made, main = program(), artifact.manifest.main
    facts = step_facts(made, [("w", made.weights["w"].type)])
    entries: dict[str, Any] = {}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inputs": {**main.inputs, "patches": "f32[P, 23]"}}, "inputs"),
        ({"outputs": {**main.outputs, "square": "f32[R, 24]"}}, "outputs"),
        ({"limits": replace(main.limits, sizes={"P": ROWS + 1})}, "sizes"),
        ({"limits": replace(main.limits, sizes={"P": 2, "Q": 2})}, "sizes"),
    ]
    for changes, named in cases:
        other = replace(main, weights=replace(main.weights, tensors=()), **changes)
        with pytest.raises(ArtifactError, match=f"does not match the manifest: .*{named} "):
            check_step_facts({**facts, "weights": _none()}, other, entries, where="x")


def _none() -> str:
    """What stands for no weights."""
    return str(step_facts(program(), [])["weights"])


def one_input(name: str, kind: TensorType, **outputs: TensorType) -> Program:
    """A program that gives what it is given; outputs of other types are made up."""
    b = ProgramBuilder("one", phase="planned")
    for symbol in ("T", "R", "P", "p"):
        b.symbol(symbol, 1, 8)
    value = b.input(name, kind)
    b.output(**{n: Value(value.name, made) for n, made in outputs.items()} or {"same": value})
    return b.build()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (one_input("positions", f32(Sym("T"))), r"positions is f32\[T\], expected i64\[T\]"),
        (one_input("logits_index", i64(Sym("T"))), r"i64\[T\], expected i64\[R\]"),
        (one_input("x", f32(Sym("P")), logits=f32(Sym("P"), 3)), "expected a row for each of R"),
        (one_input("x", f32(Sym("R")), hidden=f32(Sym("R"))), "expected a row for each of R"),
        (one_input("x", f32(Sym("T")), hidden=f32(Sym("T"), 3)), "expected a row for each of R"),
        (one_input("x", f32(Sym("T")), y=f32(Sym("P"))), "no input has P in its shape"),
        (one_input("x", TensorType(DType.BF16, (2,))), "the input x .* takes f32, i32 and i64"),
        (one_input("x", i64(2)), "the output same .* gives floating-point values only"),
        (one_input("x", f32(Sym("p"))), "cannot have a symbol 'p'"),
        (one_input("x", f32(Sym("Share"))), "cannot have a symbol 'Share'"),
    ],
)
def test_what_no_step_could_have_is_refused(made: Program, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        get_backend("cpp").check(made, resolve_target("native"))


def test_a_program_without_logits_draws_no_tokens(tmp_path: Path) -> None:
    b = ProgramBuilder("square", phase="planned")
    b.symbol("R", 1, 8)
    x = b.input("x", f32(Sym("R"), 3))
    b.output(y=b.emit("mul", x, x))
    for backend in ("cpp", "reference"):
        artifact = build(
            program(), tmp_path / backend, backend=backend, beside={"square": b.build()}
        )
        made = open_executor(artifact, ExecutorConfig(num_blocks=(), program="square"))
        given: dict[str, Any] = {"x": np.full((2, 3), 3, np.float32)}
        output = run_step(made, step(given, 2))
        assert output.others["y"].tolist() == [[9.0] * 3] * 2
        assert output.logits.shape == (2, 0)
        draws = np.zeros(1, DRAW)
        with pytest.raises(InfcError, match="this program gives no logits"):
            run_step(made, step(given, 2, draws))
        made.close()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_logits_of_every_token_are_not_given_for_some(tmp_path: Path, backend: str) -> None:
    made = _rows(tmp_path, backend)
    given = step({}, 2)
    given = replace(
        given, token_ids=np.arange(4, dtype=np.int32), positions=np.arange(4, dtype=np.int32)
    )
    executor = open_executor(made, ExecutorConfig(num_blocks=()))
    with pytest.raises(InfcError, match="a step of 4 tokens has 2 rows"):
        run_step(executor, given)
    executor.close()


def _rows(tmp_path: Path, backend: str = "cpp") -> Artifact:
    """A program that takes and gives what every step does."""
    b = ProgramBuilder("rows", phase="planned")
    b.symbol("T", 1, 8)
    ids = b.input("input_ids", i64(Sym("T")))
    b.output(logits=b.emit("embedding", b.weight("table", f32(VOCABULARY, WIDTH)), ids))
    made = with_weights(b.build(), random_weights(b.build(), 4))
    return build(made, tmp_path / "rows", backend=backend)


@pytest.mark.parametrize(("version", "runs"), [(8, True), (7, False)])
def test_libraries_of_the_interface_before(tmp_path: Path, version: int, runs: bool) -> None:
    """Beside a manifest of that time, as an infc of then wrote both."""
    new, old = _rows(tmp_path), tmp_path / "old"
    with ArtifactWriter(old) as writer:
        shutil.copytree(new.path, writer.path, dirs_exist_ok=True)
        (writer.path / "manifest.json").unlink()
        header = writer.path / "code/kernels/abi.hpp"
        text = header.read_text()
        assert "#define INFC_ABI 9\n" in text
        header.write_text(text.replace("#define INFC_ABI 9\n", f"#define INFC_ABI {version}\n"))
        library = writer.path / "code/model.so"
        with LibraryBuild(library.with_name("step.cpp"), library, resolve_target("native")) as made:
            made.wait()
        writer.commit(new.manifest)
    take_back(old)
    step = make_step([Chunk([3, 1, 4], 0, [1])], num_groups=0, block_size=16)
    if not runs:
        with pytest.raises(
            ArtifactError, match=rf"version {version}, this infc runs versions 8 to 9"
        ):
            open_cpp(open_artifact(old))
        return
    before, now = (run_step(open_cpp(one), step).logits for one in (open_artifact(old), new))
    np.testing.assert_array_equal(before, now)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_value_may_have_several_names(backend: str, tmp_path: Path) -> None:
    whole = program()
    named = whole.named_outputs()
    twice = {"first": named["square"], **named, "scores": named["logits"], "last": named["square"]}
    made = replace(whole, outputs=tuple(twice.values()), output_names=tuple(twice))
    artifact = build(made, tmp_path / "a", backend=backend)
    executor = open_executor(artifact, ExecutorConfig(num_blocks=(), num_threads=2))
    output = run_step(executor, step(inputs(17, [3, 1]), 2))
    executor.close()
    assert list(output.others) == ["chosen", "first", "last", "scores", "square"]
    np.testing.assert_array_equal(output.others["first"], output.others["square"])
    np.testing.assert_array_equal(output.others["last"], output.others["square"])
    np.testing.assert_array_equal(output.others["scores"], output.logits)
    assert output.others["square"].any() and output.logits.any()
