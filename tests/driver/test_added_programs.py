"""Several programs in one artifact: the model, its head, and its first layer as a model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import infc
from infc.driver.added_programs import AddedProgram
from infc.driver.bare_executor import open_bare
from infc.driver.rebuild import rebuild_artifact
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ArtifactError, CapacityError, InfcError, ProgramError, UsageError
from infc.ir.interpret import interpret
from infc.ir.program import Program, WeightExpr
from infc.ir.safetensors import MappedSafetensors
from infc.ir.schemes import get_scheme
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights
from infc.passes.cut_program import cut_program
from infc.runtime.executors.base import HOST, run_step
from infc.runtime.limits import plan_runtime
from infc.runtime.memory_plan import MemoryBroker
from infc.runtime.options import RuntimeOptions

from ..checkpoints import make_checkpoint
from ..codegen.harness import Chunk, make_step
from ..codegen.test_further import step as step_of
from .compiling import Lines, contents

TOKENS = [3, 14, 15, 9, 2, 6, 5, 35, 8, 97, 93, 23, 84, 62, 64, 33, 8, 32, 79, 50, 28, 8]
BLOCK = 16
CAPTURED: dict[str, Program] = {}
"""What was made of the model last, for comparison."""


def head(model: Program) -> Program:
    """The model's head on rows of hidden states, and these rows with a weight of its own."""
    (weight,) = next(node for node in reversed(model.nodes) if node.op == "linear").weights()
    b = ProgramBuilder("head")
    b.symbol("R", 1, 8)
    width = TensorType(DType.F32, (model.spec.hidden_size,))
    states = b.input("states", TensorType(DType.F32, (Sym("R"), *width.shape)))
    b.weights[weight.name] = model.weights[weight.name]
    own = b.weight("own", width, WeightExpr("data", (), {"key": "own"}))
    b.output(scaled=b.emit("mul", states, own), logits=b.emit("linear", states, weight))
    values = torch.linspace(1, 2, model.spec.hidden_size)
    b.loaders = {**model.loaders, "data": lambda name: values}
    return b.build()


def first_layer(model: Program) -> Program:
    """The model with its first layer alone: what could draft for it."""
    cut = cut_program(model, [0])
    assert isinstance(cut, Program)
    CAPTURED["draft"] = cut
    return cut


PROGRAMS = {"head": AddedProgram(make=head), "draft": AddedProgram(make=first_layer, rank=1)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("added") / "checkpoint"
    return make_checkpoint("llama", place, num_hidden_layers=3)


def compiled(checkpoint: Path, output: Path, backend: str, **sets: Any) -> tuple[Artifact, Lines]:
    lines = Lines()
    overrides = {"dtype": "float32", "backend": backend, "kv_cache.block_size": BLOCK}
    made = infc.compile(
        checkpoint,
        output,
        overrides={**overrides, "runtime.step_tokens": 64, "runtime.logit_rows": 64, **sets},
        verify=False,
        progress=lines,
        programs=PROGRAMS,
    )
    return made, lines


def with_programs(
    checkpoint: Path, output: Path, programs: dict[str, AddedProgram], **sets: Any
) -> Artifact:
    """An artifact of the backend reference in float32; nothing is verified."""
    overrides = {"backend": "reference", "dtype": "float32", **sets}
    return infc.compile(
        checkpoint, output, overrides=overrides, verify=False, progress=False, programs=programs
    )


@pytest.fixture(scope="module", params=["cpp", "reference"])
def artifact(request: pytest.FixtureRequest, checkpoint: Path) -> Artifact:
    made, lines = compiled(checkpoint, checkpoint.parent / request.param, request.param)
    assert "not cached: programs were added by a caller" in lines.lines
    return made


def test_the_manifest_says_what_each_takes_and_gives(artifact: Artifact) -> None:
    programs = artifact.manifest.programs
    assert sorted(programs) == ["draft", "head", "main"]
    hidden, vocabulary = artifact.manifest.model.hidden_size, artifact.manifest.model.vocab_size
    head = programs["head"]
    assert head.inputs == {"states": f"f32[R, {hidden}]"}
    assert head.outputs == {"logits": f"f32[R, {vocabulary}]", "scaled": f"f32[R, {hidden}]"}
    assert (head.limits.logit_rows, head.resources, head.rank) == (8, (), None)
    draft = programs["draft"]
    assert (draft.inputs, draft.outputs) == (programs["main"].inputs, programs["main"].outputs)
    assert [group.layers for group in draft.resources] == [(0,)]
    assert draft.rank == 1
    assert draft.entry.file.startswith("programs/draft/")
    assert {
        "programs/head/program.ir",
        "programs/head/report.json",
    } <= artifact.manifest.files.keys()


def test_what_is_the_same_is_stored_once(artifact: Artifact) -> None:
    def stored(name: str) -> list[str]:
        file = artifact.path / artifact.manifest.programs[name].weights.file
        return MappedSafetensors(file).names()

    head, draft = (artifact.manifest.programs[name].weights for name in ("head", "draft"))
    assert stored("head") == ["own"]
    assert set(head.shared) == set(head.tensors) - {"own"} != set()
    # A constant that a pass made is not known to be the same.
    constants = [name for name in draft.tensors if name.startswith("frequencies")]
    assert stored("draft") == constants
    assert set(draft.shared) == set(draft.tensors) - set(constants)
    assert set(draft.tensors) < set(stored("main"))


def test_the_head_gives_what_the_model_does(artifact: Artifact) -> None:
    """In generated code bit for bit: which other rows there are does not matter."""
    model = forced(artifact, "main", [TOKENS])
    states = model.hidden[-5:]
    with open_bare(artifact, (), num_threads=2, program="head") as executor:
        output = run_step(executor, step_of({"states": states}, len(states)))
    exact = artifact.manifest.backend == "cpp"
    error = 0 if exact else 1e-4
    np.testing.assert_allclose(output.logits, model.logits[-5:], rtol=error, atol=error)
    values = torch.linspace(1, 2, states.shape[1]).numpy()
    np.testing.assert_array_equal(output.others["scaled"], states * values)


class Rows:
    """Logits and hidden states after every token."""

    def __init__(self, outputs: list[Any]) -> None:
        self.logits: NDArray[np.float32] = np.concatenate([one.logits for one in outputs])
        self.hidden: NDArray[np.float32] = np.concatenate([one.hidden for one in outputs])


def forced(artifact: Artifact, program: str, chunks: list[list[int]]) -> Rows:
    """A program run over chunks of one sequence."""
    groups = artifact.manifest.programs[program].resources
    outputs, start = [], 0
    with open_bare(artifact, (5,) * len(groups), num_threads=2, program=program) as executor:
        for chunk in chunks:
            part = Chunk(chunk, start, [3, 1, 4])
            step = make_step([part], num_groups=len(groups), block_size=BLOCK)
            outputs.append(run_step(executor, replace(step, wants_hidden=True)))
            start += len(chunk)
    return Rows(outputs)


def test_the_first_layer_has_a_cache_of_its_own(artifact: Artifact) -> None:
    rows = forced(
        artifact, "draft", [TOKENS[:9], TOKENS[9:17], *([token] for token in TOKENS[17:])]
    )
    program, ids = CAPTURED["draft"], torch.tensor(TOKENS)
    inputs = {"input_ids": ids, "positions": torch.arange(len(ids))}
    inputs["logits_index"] = inputs["positions"]
    logits, hidden = interpret(program, inputs, program_weights(program), None, "f64")
    np.testing.assert_allclose(rows.logits, logits.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows.hidden, hidden.numpy(), rtol=1e-4, atol=1e-4)
    model = forced(artifact, "main", [TOKENS])
    assert np.abs(model.logits - rows.logits).max() > 0.1, "they are not the same model"


def test_all_run_beside_one_another(artifact: Artifact) -> None:
    """Each with threads, cache and arena of its own, in one process."""
    alone = [forced(artifact, name, [TOKENS]).logits for name in ("main", "draft")]
    part = Chunk(TOKENS, 0, [3, 1, 4])
    step = make_step([part], num_groups=1, block_size=BLOCK)
    with (
        open_bare(artifact, (5,), num_threads=1, program="main") as main,
        open_bare(artifact, (5,), num_threads=1, program="draft") as draft,
    ):
        for _ in range(2):
            for executor, expected in zip((main, draft), alone, strict=True):
                np.testing.assert_array_equal(run_step(executor, step).logits, expected)
    with infc.LLM(artifact) as llm:
        (output,) = llm.generate([TOKENS], infc.SamplingParams(max_tokens=1, temperature=0))
    assert output.outputs[0].token_ids == (int(alone[0][-1].argmax()),)


def test_each_is_planned(artifact: Artifact) -> None:
    manifest, options = artifact.manifest, RuntimeOptions(threads=1, kv_memory="64MiB")
    plans = {n: plan_runtime(manifest, options, program=n) for n in manifest.programs}
    main, head, draft = (plans[name].memory[HOST] for name in ("main", "head", "draft"))
    assert plans["head"].num_blocks == () and head.kv == 0
    assert main.kv == 3 * draft.kv > 0
    rows, width = 8, manifest.model.vocab_size + manifest.model.hidden_size
    assert head.handed_over == rows * width * 4
    file = manifest.files[manifest.main.weights.file].bytes
    assert (main.weights, head.mapped, draft.mapped) == (file, file, file)
    assert 0 < head.weights < 4096 and 0 < draft.weights < 4096
    with pytest.raises(UsageError, match=r"no program 'heads' .did you mean 'head'"):
        plan_runtime(manifest, options, program="heads")


@pytest.mark.parametrize("name", ["programs/head/weights.safetensors", "programs/draft/program.ir"])
def test_every_byte_of_all_is_checked(artifact: Artifact, name: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path, data in contents(artifact.path).items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(data)
    whole = bytearray((copy / name).read_bytes())
    whole[-1] ^= 1
    (copy / name).write_bytes(whole)
    with pytest.raises(ArtifactError, match=f"{name}: .*do not match their digest"):
        open_artifact(copy)


@pytest.mark.parametrize("quantization", [pytest.param("none", marks=pytest.mark.breadth), "int8"])
def test_another_target_is_rebuilt_as_it_is_compiled(
    checkpoint: Path, tmp_path: Path, quantization: str
) -> None:
    sets = {"quantization.scheme": quantization}
    if quantization != "none":
        sets |= {"quantization.method": "nearest", "dtype": "bfloat16"}
    made = [
        compiled(checkpoint, tmp_path / target, "cpp", target=target, **sets)[0]
        for target in ("x86-64-v2", "x86-64-v3")
    ]
    draft, head = (made[0].manifest.programs[name].weights for name in ("draft", "head"))
    assert draft.shared and set(head.tensors) - set(head.shared) == {"own"}
    rebuilt = rebuild_artifact(made[0].path, "x86-64-v3", tmp_path / "rebuilt")
    assert contents(rebuilt.path) == contents(made[1].path)


def test_calibrated_weights_are_shared(tmp_path: Path) -> None:
    place = make_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=2, tokenizer=True)
    sets: dict[str, Any] = {"quantization.scheme": "int4", "quantization.method": "gptq"}
    sets |= {"quantization.calibration.tokens": 256, "accuracy.max_kl": 10}
    made, _ = compiled(place, tmp_path / "a", "reference", **sets)
    for name in ("head", "draft"):
        weights = made.manifest.programs[name].weights
        own = set(weights.tensors) - set(weights.shared)
        assert {one for one in own if not one.startswith("frequencies")} <= {"own"}, name


def test_a_checkpoint_of_its_own_has_codes_of_its_own(tmp_path: Path) -> None:
    """Though its tensors have the names and shapes of those of the model, which is calibrated."""
    place = make_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=2, tokenizer=True)
    other = make_checkpoint("llama", tmp_path / "other", num_hidden_layers=2, seed=1)
    read = MappedSafetensors(other / "model.safetensors").tensor
    sets: dict[str, Any] = {"quantization.scheme": "int4", "quantization.method": "gptq"}
    sets |= {"quantization.channel_scaling": "awq", "quantization.calibration.tokens": 256}

    def draft(model: Program) -> Program:
        cut = cut_program(model, [0])
        assert isinstance(cut, Program)
        return replace(cut, loaders={**model.loaders, "checkpoint": read})

    sets["accuracy.max_kl"] = 10
    made = with_programs(place, tmp_path / "a", {"draft": AddedProgram(make=draft)}, **sets)
    weights = made.manifest.programs["draft"].weights
    assert weights.shared == ()
    stored = MappedSafetensors(made.path / weights.file)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        name = f"model.layers.0.{part}.weight.codes"
        matrix = read(name.removesuffix(".codes"))
        rounded = (get_scheme(scheme).quantize(matrix)[0] for scheme in ("int4", "int8"))
        assert any(torch.equal(stored.tensor(name), codes) for codes in rounded), name


def projection(model: Program) -> Program:
    """A product with a matrix that the model does not have."""
    width = model.spec.hidden_size
    b = ProgramBuilder("projection")
    b.symbol("R", 1, 8)
    states = b.input("states", TensorType(DType.F32, (Sym("R"), width)))
    expr = WeightExpr("data", (), {"key": "extra"})
    extra = b.weight("extra", TensorType(DType.F32, (width, width)), expr)
    b.output(projected=b.emit("linear", states, extra))
    b.loaders = {"data": lambda name: torch.arange(width * width).reshape(width, width) / width}
    return b.build()


def test_a_rule_may_be_for_one_of_the_programs(checkpoint: Path, tmp_path: Path) -> None:
    def made(place: str, *patterns: str) -> Artifact:
        rules = [{"match": pattern, "scheme": "int8"} for pattern in patterns]
        sets = {"quantization.rules": rules, "quantization.method": "nearest"}
        programs = {"draft": PROGRAMS["draft"], "projection": AddedProgram(make=projection)}
        return with_programs(checkpoint, tmp_path / place, programs, **sets)

    programs = made("a", "model.layers.2.*", "extra").manifest.programs
    coded = {
        name: {one for one in program.weights.tensors if one.endswith(".codes")}
        for name, program in programs.items()
    }
    assert coded["main"] and all("layers.2." in one for one in coded["main"])
    assert coded["draft"] == set() and coded["projection"] == {"extra.codes"}
    with pytest.raises(UsageError, match="rules: no matrix is named extar"):
        made("b", "model.layers.2.*", "extra", "extar")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "make", "error", "message"),
    [
        ("main", head, UsageError, "main is the model's own program"),
        ("Head", head, UsageError, "'Head' cannot be the name of a program"),
        ("../x", head, UsageError, "'../x' cannot be the name of a program"),
        (
            "x",
            lambda m: replace(m, phase="fused"),
            ProgramError,
            "x is in the phase fused, expected",
        ),
        ("x", lambda m: m.with_nodes(m.nodes[1:]), ProgramError, "is used before it is defined"),
        ("x", lambda m: None, UsageError, "the program x is a NoneType, expected a Program"),
        (
            "x",
            lambda m: replace(m, output_names=("logits", "logits")),
            ProgramError,
            "two outputs have the name logits",
        ),
    ],
)
def test_what_cannot_be_added(
    checkpoint: Path, tmp_path: Path, name: str, make: Any, error: type[InfcError], message: str
) -> None:
    with pytest.raises(error, match=message):
        with_programs(checkpoint, tmp_path / "a", {name: AddedProgram(make=make)})
    assert list(tmp_path.iterdir()) == []


def test_each_is_verified(checkpoint: Path, tmp_path: Path) -> None:
    infc.compile(
        checkpoint,
        tmp_path / "a",
        overrides={"backend": "reference", "dtype": "float32"},
        progress=False,
        programs=PROGRAMS,
        dump_ir_after="lower-kv",
        dump_dir=tmp_path / "dumps",
    )
    (dump,) = (tmp_path / "dumps/draft").glob("*-lower-kv.ir")
    assert "resource" in dump.read_text()
    report = (tmp_path / "a/programs/draft/report.json").read_text()
    assert "paged steps of 2 sequences agree with a whole run" in report


def test_shared_weights_that_are_loaded_are_taken_off_first(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an artifact whose files others can write to, opened without an engine."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    manifest = artifact.manifest
    shared, own = (
        manifest.files[manifest.programs[name].weights.file].bytes for name in ("main", "draft")
    )

    def taken(free: int) -> int:
        """What the draft takes where so many bytes are free."""
        monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: free)
        broker = MemoryBroker()
        for module in ("memory_plan", "limits"):
            monkeypatch.setattr(f"infc.runtime.{module}.BROKER", broker)
        for name in ("cpp.CppExecutor", "reference.ReferenceExecutor"):
            monkeypatch.setattr(f"infc.runtime.executors.{name}.touched_bytes", lambda _: {})
        opened = open_artifact(copy)
        with open_bare(opened, (5,), num_threads=1, program="draft"):
            return broker.untouched()

    fixed = taken(1 << 40) - own  # shared weights are mapped
    assert taken(fixed + shared) == fixed + own
    for path in copy.rglob("*.safetensors"):
        path.chmod(0o666)
    assert taken(fixed + shared + 2 * own) == fixed + shared + own
    with pytest.raises(CapacityError, match="that are shared with the main program take"):
        taken(fixed + shared - 1)
    with pytest.raises(ArtifactError, match="not safe to map"):
        taken(fixed + shared + own // 2)
