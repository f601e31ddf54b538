"""Artifacts to explain: the bundled model's real programs, beside stubs of code and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from infc.codegen.triton.backend import TritonBackend, generate
from infc.frontend.load import load_model
from infc.ir.artifact import ArtifactWriter
from infc.ir.launches import LAUNCHES_FILE, Kernel, LaunchPlan
from infc.ir.manifest import (
    MAIN,
    CompiledProgram,
    Entry,
    Limits,
    Manifest,
    TargetMachine,
    WeightsFile,
    canonical_json,
    input_types,
    output_types,
)
from infc.ir.plan import planned_arena
from infc.ir.program import Program
from infc.ir.targets import Target
from infc.ir.text import parse_program, print_program
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import build_pipeline, parse_pipeline

from ...passes.test_verification import model
from ...plans import PLAN

TINY = Path(__file__).parents[3] / "recipes/tiny/checkpoint"
STEP_TOKENS, LOGIT_ROWS, SEQUENCES = 512, 64, 48
GOLDEN = Path(__file__).parent / "golden"
MEMORY = 64 << 20


def capture_tiny() -> Program:
    """The bundled model as it is captured."""
    return load_model(
        TINY, dtype="bfloat16", max_context=None, step_tokens=STEP_TOKENS, logit_rows=LOGIT_ROWS
    )


def stack(layers: int) -> Program:
    """A stack of equal layers, its weights named as checkpoints name them."""
    text = print_program(model(layers))
    return parse_program(re.sub(r"\bl(\d+)\.(gate|up)", r"layers.\1.\2", text))


def write_explained(
    destination: Path,
    captured: Program,
    *,
    passes: Mapping[str, Any] | None = None,
    name: str = "tiny",
    target: Target | None = None,
) -> Path:
    """An artifact of the program after the pipeline, with a stub for its code and weights.

    With the target of a GPU, it has the launches of that backend, whose kernels are stubs.
    """
    plan = PLAN if target is None else parse_pipeline(TritonBackend().plan_passes(target)).passes
    program, report = run_pipeline(
        captured,
        build_pipeline(dict(passes or {}), plan=plan),
        verify=False,
    )
    code = {"code/model.so": b"\0" * 4096} if target is None else launch_files(program, target)
    entry = Entry("cpp-shared-library", "code/model.so", 1)
    machine = TargetMachine("x86-64-v3", ("avx2",))
    if target is not None:
        entry = Entry("launches", LAUNCHES_FILE)
        machine = TargetMachine(target.name, target.features)
    main = CompiledProgram(
        entry=entry,
        inputs=input_types(program),
        outputs=output_types(program),
        limits=Limits(program.spec.max_context, STEP_TOKENS, SEQUENCES, LOGIT_ROWS),
        arena_bytes=planned_arena(program).num_bytes,
        weights=WeightsFile("weights.safetensors", ()),
        resources=program.resources,
    )
    manifest = Manifest(
        infc_version="0.0.0",
        recipe={"model": name, "passes": dict(passes or {}), "dtype": "bfloat16"},
        model=replace(program.spec, vocab_size=main.vocab_size or 0),
        backend="cpp" if target is None else "triton",
        target=machine,
        programs={MAIN: main},
        tokenizer=None,
    )
    with ArtifactWriter(destination) as writer:
        for file, data in code.items():
            (writer.path / file).parent.mkdir(exist_ok=True)
            (writer.path / file).write_bytes(data)
        (writer.path / "weights.safetensors").write_bytes(b"\0" * 8192)
        (writer.path / "captured.ir").write_text(print_program(captured))
        (writer.path / "program.ir").write_text(print_program(program))
        (writer.path / "report.json").write_text(canonical_json(report.as_data()))
        writer.commit(manifest)
    return destination


def launch_files(program: Program, target: Target) -> dict[str, bytes]:
    """The launches of a planned program, beside stubs of machine code."""
    made = generate(program, target)
    kernels = {
        key: Kernel(key, f"code/{key}.cubin", f"code/{key}.ptx", 128, 1024, 40 + place)
        for place, key in enumerate(made.codes)
    }
    plan = LaunchPlan(target.name, kernels, made.forms, made.arena_bytes, made.table_width)
    stubs = {one.image: bytes(100) for one in kernels.values()}
    return {LAUNCHES_FILE: plan.to_text().encode(), **stubs}


def check_golden(name: str, actual: str, update: bool) -> None:
    """Compares with `golden/NAME`, or writes it."""
    path = GOLDEN / name
    if update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(actual, encoding="utf-8")
    assert actual == path.read_text(encoding="utf-8")
