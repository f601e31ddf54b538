"""Models in ONNX on onnxruntime, under the real scheduler, over memory that was never written."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto
from onnx import load as read_model

import infc
from infc.codegen.onnx import backend as onnx_backend
from infc.driver.added_programs import AddedProgram
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ArtifactError
from infc.ir.safetensors import read_header
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import HOST, ExecutorConfig, ReportsMemory, run_step

from ..codegen.harness import Chunk, make_step
from ..emulation.scripted import errors, run_script
from ..emulation.test_models import RUN, logprobs, tokens
from .builds import Build, Builds, quantized_alike
from .neighbours import Answer, Events, play
from .onnx_builds import BOUND, OWN, SLOTS, onnx, poison, reference
from .support import (
    BLOCK_SIZE,
    compile_checkpoint,
    forced_rows,
    parity_prompts,
    prompts,
    relative_error,
    teacher_forced,
)
from .test_int8 import (
    EQUAL,
    SHARE_EQUAL_ROUTED,
    SHARE_EQUAL_TABLE,
    SHARE_REROUTED,
    STEP,
    row_errors,
)

MODELS = [
    pytest.param(Build("gemma2"), id="windows and a soft-cap"),
    pytest.param(Build("gpt_oss", changes=(("num_hidden_layers", 2),)), id="sinks and experts"),
    pytest.param(Build("llama", changes=(("num_hidden_layers", 2),)), id="all keys"),
    pytest.param(Build("gemma4_text"), id="caches of other layers", marks=pytest.mark.breadth),
    pytest.param(Build("deepseek_v3"), id="values of another size", marks=pytest.mark.breadth),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values that no step has written are NaN."""
    poison(monkeypatch)


@pytest.mark.parametrize("sets", [{}, OWN], ids=["standard", "onnxruntime"])
@pytest.mark.parametrize("model", MODELS)
def test_steps_give_what_the_reference_gives(
    model: Build, sets: dict[str, str], builds: Builds
) -> None:
    """Prompts in chunks, mixed steps, copied blocks, many sequences."""
    found = run_script(builds.artifact(onnx(model, **sets)))
    assert max(errors(found, run_script(builds.artifact(reference(model))))) < BOUND


@pytest.mark.parametrize("sets", [SLOTS, SLOTS | OWN], ids=["standard", "onnxruntime"])
@pytest.mark.parametrize("model", MODELS)
def test_slots_give_what_the_reference_gives(
    model: Build, sets: dict[str, str], builds: Builds
) -> None:
    """Chunks of uneven sizes, of sequences whose slots are in no order."""
    artifact = builds.artifact(onnx(model, **sets))
    (sizes,) = {group.block_size for group in artifact.manifest.main.resources}
    limits = artifact.manifest.main.limits
    assert sizes == limits.max_context + min(limits.step_tokens, limits.max_context)
    sequences = parity_prompts(model.arch)
    found = forced_rows(artifact, sequences)
    expected = forced_rows(builds.artifact(reference(model)), sequences)
    logits, hidden = (max(map(relative_error, *pair)) for pair in zip(found, expected, strict=True))
    bound = 2 * BOUND if sets.get("onnx.dialect") == "onnxruntime" else BOUND  # its own norm
    assert logits < bound and hidden < 2 * bound


@pytest.mark.parametrize(
    ("sets", "form"),
    [
        (OWN, "grouped-queries"),
        ({}, "paged"),
        (OWN | {"kv_cache.dtype": "bfloat16"}, "paged"),
        (OWN | {"runtime.logit_rows": 64}, "paged"),
    ],
    ids=["own ops", "standard", "16 bits", "too large"],
)
def test_auto_is_slots_where_they_are_faster_and_small(
    sets: dict[str, Any], form: str, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "runtime.logit_rows" in sets:
        monkeypatch.setattr(onnx_backend, "MOST_SLOT_BYTES", 1 << 20)
    model = Build("llama", changes=(("num_hidden_layers", 2),))
    artifact = builds.artifact(onnx(model, **{"onnx.kv": "auto"}, **sets))
    session = read_model(artifact.entry_path, load_external_data=False)
    found = {one.key: one.value for one in session.metadata_props}["infc.kv"]
    (group,) = artifact.manifest.main.resources
    assert (found, group.block_size > BLOCK_SIZE) == (form, form != "paged")
    if "kv_cache.dtype" in sets:
        return
    sequences = prompts(artifact.manifest.model.vocab_size, (33, 5))
    expected = teacher_forced(builds.artifact(reference(model)), sequences)
    assert max(map(relative_error, teacher_forced(artifact, sequences), expected)) < 2 * BOUND


def answers(artifact: Artifact, counts: Counter[str]) -> list[Answer]:
    """What each job gets from an engine with too few blocks; what happened is counted."""
    events = Events(counts)
    with pytest.MonkeyPatch.context() as patch:
        events.watch(patch)
        found = dict(play(artifact, RUN, events))
    return [found[job] for job in RUN.jobs]


@pytest.mark.parametrize("sets", [{}, SLOTS, SLOTS | OWN], ids=["pages", "slots", "own slots"])
@pytest.mark.parametrize("model", MODELS[1:3])
def test_requests_get_what_the_reference_gives(
    model: Build, sets: dict[str, str], builds: Builds
) -> None:
    """Prefixes are found again, sequences preempted, choices share blocks."""
    counts = Counter[str]()
    artifact = builds.artifact(onnx(model, **sets))
    found = answers(artifact, counts)
    expected = answers(builds.artifact(reference(model)), Counter())
    assert tokens(found) == tokens(expected)
    assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-3)
    assert counts["copies on write"]
    if not sets and set(artifact.manifest.model.windows) <= {None}:  # else blocks are free soon
        assert counts["prefix hits"] and counts["preemptions"]


@pytest.mark.parametrize("model", [Build("llama"), Build("gpt_oss")], ids=lambda one: one.arch)
def test_a_whole_sequence_needs_no_cache(model: Build, builds: Builds) -> None:
    """In plain onnxruntime."""
    artifact = builds.artifact(onnx(model, **{"onnx.whole_sequence": True}))
    session = onnxruntime.InferenceSession(artifact.path / "sequence.onnx")
    (prompt,) = prompts(artifact.manifest.model.vocab_size, (70,))
    places = np.arange(len(prompt))
    feeds = {"input_ids": np.array(prompt), "positions": places, "logits_index": places}
    logits, _ = session.run(["logits", "hidden"], feeds)
    (expected,), _ = forced_rows(builds.artifact(reference(model)), [prompt])
    assert relative_error(logits, expected) < BOUND


SCHEMES = {
    "int8-token": (0.4, 0.1),
    "int8": (SHARE_EQUAL_TABLE, STEP),
    "q4_0": (SHARE_EQUAL_TABLE, STEP),
    "int4-token": (SHARE_EQUAL_TABLE, STEP),
    "int8-weights": (1.0, EQUAL),
    "q4_0-weights": (1.0, EQUAL),
}
"""How many rows have the codes of the reference all along, and the error of the others."""


@pytest.mark.parametrize("arch", ["llama-tied", "qwen2"])
@pytest.mark.parametrize("dialect", ["standard", "onnxruntime"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_mean_what_they_mean_in_the_reference(
    scheme: str, dialect: str, arch: str, builds: Builds
) -> None:
    """With biases, and with a head that is the table of tokens."""
    sets = (("quantization", quantized_alike(scheme, method="nearest")),)
    model = Build(arch, sets=sets)
    artifact = builds.artifact(onnx(model, **{"onnx.dialect": dialect}))
    sequences = prompts(artifact.manifest.model.vocab_size)
    ours, theirs = (
        np.concatenate(teacher_forced(one, sequences))
        for one in (artifact, builds.artifact(reference(model)))
    )
    row = row_errors(ours, theirs)
    share, step = SCHEMES[scheme]
    assert (row <= EQUAL).mean() >= share
    assert row.max() <= step


EXPERTS = {
    "int8-weights": (1.0, EQUAL),
    "q4_0-weights": (1.0, EQUAL),
    "int8": (SHARE_EQUAL_ROUTED, STEP),
    "int8-token": (SHARE_EQUAL_ROUTED, STEP),
    "int4-token": (SHARE_EQUAL_ROUTED, STEP),
}


@pytest.mark.parametrize(
    ("arch", "dialect", "scheme"),
    [
        ("mixtral", "standard", "int8"),
        ("mixtral", "onnxruntime", "int8"),
        ("mixtral", "standard", "int8-token"),
        ("mixtral", "standard", "int4-token"),
        ("mixtral", "onnxruntime", "int4-token"),
        ("gpt_oss", "standard", "q4_0-weights"),
        ("gpt_oss", "onnxruntime", "q4_0-weights"),
        ("gpt_oss", "standard", "int8-weights"),
    ],
)
def test_experts_in_codes_mean_what_they_mean_in_the_reference(
    scheme: str, dialect: str, arch: str, builds: Builds
) -> None:
    """With biases, and a gate of its own; another expert may be chosen where a row is rounded."""
    sets = (("quantization", quantized_alike(scheme, method="nearest")),)
    model = Build(arch, sets=sets, changes=(("num_hidden_layers", 2),))
    artifact = builds.artifact(onnx(model, **{"onnx.dialect": dialect}))
    assert "scaled_moe" in (artifact.path / "program.ir").read_text()
    sequences = prompts(artifact.manifest.model.vocab_size, (33, 5))
    ours, theirs = (
        np.concatenate(teacher_forced(one, sequences))
        for one in (artifact, builds.artifact(reference(model)))
    )
    row = row_errors(ours, theirs)
    share, step = EXPERTS[scheme]
    assert (row <= EQUAL).mean() >= share, (row <= EQUAL).mean()
    assert (row > step).mean() <= SHARE_REROUTED, (row > step).mean()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mixtral"])  # the second has biases
def test_blocks_of_4_bits_are_multiplied_as_they_are(
    arch: str, builds: Builds, tmp_path: Path
) -> None:
    """onnxruntime makes one op of each dequantization and the product behind it."""
    sets = (("quantization", {"scheme": "q4_0-weights", "method": "nearest", "embedding": "none"}),)
    artifact = builds.artifact(onnx(Build(arch, sets=sets)))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(artifact.entry_path, options)
    fused = read_model(tmp_path / "optimized.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in fused.graph.node)
    made = read_model(artifact.entry_path, load_external_data=False)
    coded = [one for one in made.graph.initializer if one.data_type == TensorProto.INT4]
    assert kinds["MatMulNBits"] >= len(coded) > 8
    assert not kinds["DequantizeLinear"]


ROUNDED = {"bfloat16": 0.02, "float16": 0.0025}
"""Eight and eleven bits: where sums differ in their last bits, a row may be rounded otherwise."""


@pytest.mark.parametrize("sets", [{}, SLOTS, OWN | SLOTS], ids=["pages", "slots", "own slots"])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_16_bits_are_rounded_where_the_reference_rounds(
    dtype: str, sets: dict[str, str], builds: Builds
) -> None:
    """Matrices and the cache take 16 bits, and nothing else is rounded."""
    model = Build("llama", dtype=dtype)
    artifact = builds.artifact(onnx(model, **sets))
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert {group.dtype for group in artifact.manifest.main.resources} == {short}
    sequences = prompts(artifact.manifest.model.vocab_size)
    found = teacher_forced(artifact, sequences)
    expected = teacher_forced(builds.artifact(reference(model)), sequences)
    assert max(map(relative_error, found, expected)) < ROUNDED[dtype]


def test_float16_is_nearer_to_float32_than_bfloat16(builds: Builds, tmp_path: Path) -> None:
    """Of one checkpoint, whose numbers neither has."""
    exact = builds.artifact(reference(Build("llama")))
    sequences = prompts(exact.manifest.model.vocab_size)
    expected = teacher_forced(exact, sequences)
    error = {}
    for dtype in ROUNDED:
        checkpoint = builds.checkpoint(Build("llama"))
        artifact = compile_checkpoint(checkpoint, tmp_path / dtype, backend="onnx", dtype=dtype)
        error[dtype] = max(map(relative_error, teacher_forced(artifact, sequences), expected))
    assert error["float16"] < error["bfloat16"] / 4 < 0.05
    stored = {one.dtype for one in read_header(artifact.weights_path)[0].values()}
    assert "F16" in stored and "BF16" not in stored


def test_each_program_has_all_its_weights_beside_it(builds: Builds, tmp_path: Path) -> None:
    """No reader of ONNX takes data from another directory."""
    artifact = infc.compile(
        builds.checkpoint(Build("llama")),
        output=tmp_path / "both",
        overrides=["backend=onnx", f"kv_cache.block_size={BLOCK_SIZE}"],
        programs={"again": AddedProgram(make=lambda program: program)},
        verify=False,
        cache=False,
    )
    assert not artifact.manifest.program("again").weights.shared
    step = make_step([Chunk([1, 2, 3], 0, [1])], num_groups=1, block_size=BLOCK_SIZE)
    logits = []
    for name in ("main", "again"):
        config = ExecutorConfig(num_blocks=(3,), program=name)
        logits.append(run_step(open_executor(artifact, config), step).logits)
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("sets", [{}, SLOTS, SLOTS | OWN], ids=["pages", "slots", "own slots"])
def test_caches_of_another_model_are_refused(
    sets: dict[str, str], builds: Builds, tmp_path: Path
) -> None:
    """Each input and output that keys and values go through."""
    artifact = builds.artifact(onnx(Build("gemma2"), **sets))
    whole = artifact.entry_path.read_bytes()
    damaged = Path(shutil.copytree(artifact.path, tmp_path / "art")) / artifact.entry_path.name
    opened = open_artifact(damaged.parent, verify="none")
    model = read_model(artifact.entry_path, load_external_data=False)
    ours = set(artifact.manifest.main.inputs)
    names = [value.name for value in model.graph.input if value.name not in ours]
    assert len(names) > 8
    config = ExecutorConfig(num_blocks=(3,) * len(artifact.manifest.main.resources))
    for name in names:
        model = read_model(artifact.entry_path, load_external_data=False)
        for value in (*model.graph.input, *(node for node in model.graph.node)):
            if isinstance(value, NodeProto):
                for index, read in enumerate(value.input):
                    if read == name:
                        value.input[index] = "renamed"
            elif value.name == name:
                value.name = "renamed"
        damaged.write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match=f"not that of a step: .*({name}|renamed)"):
            open_executor(opened, config)
    damaged.write_bytes(whole)
    open_executor(opened, config).close()


@pytest.mark.parametrize("sets", [{}, SLOTS], ids=["pages", "slots"])
def test_what_no_step_has_written_is_not_counted_as_touched(
    sets: dict[str, str], builds: Builds
) -> None:
    artifact = builds.artifact(onnx(Build("llama"), **sets))
    (group,) = artifact.manifest.main.resources
    executor = open_executor(artifact, ExecutorConfig(num_blocks=(9,)))
    assert isinstance(executor, ReportsMemory)
    assert executor.touched_bytes() == {HOST: 0}
    token = group.bytes_per_block() // group.block_size
    chunks = [Chunk([1, 2, 3], 0, [1]), Chunk([4], 0, [7])]
    for _ in range(2):
        run_step(executor, make_step(chunks, num_groups=1, block_size=group.block_size))
        assert executor.touched_bytes() == {HOST: 4 * token}
    executor.close()
    assert executor.touched_bytes() == {HOST: 0}


def test_matrices_of_16_bits_are_counted_as_stored_and_as_widened(builds: Builds) -> None:
    """A step takes as much with either type, as all values are held in float32."""
    wide, narrow = (
        builds.artifact(onnx(Build("llama", dtype=dtype))) for dtype in ("float32", "bfloat16")
    )
    entries = read_header(narrow.weights_path)[0].values()
    widened = sum(2 * (one.end - one.begin) for one in entries if one.dtype == "BF16")
    assert widened > 1 << 16
    assert narrow.manifest.main.arena_bytes == wide.manifest.main.arena_bytes + widened


def test_the_plan_counts_what_attention_over_slots_takes(builds: Builds) -> None:
    """With it, a step that would not fit is refused before it runs."""
    pages, slots = (builds.artifact(onnx(Build("llama"), **sets)) for sets in ({}, SLOTS))
    main = slots.manifest.main
    rows = min(main.limits.logit_rows, main.limits.step_tokens)
    queries, keys = min(main.limits.step_tokens, main.limits.max_context), main.limits.max_context
    scores = rows * slots.manifest.model.num_heads * queries * keys * 4
    assert main.arena_bytes > pages.manifest.main.arena_bytes + scores
    own = builds.artifact(onnx(Build("llama"), **SLOTS, **OWN)).manifest.main
    assert own.arena_bytes < pages.manifest.main.arena_bytes + scores, "it computes fewer"
