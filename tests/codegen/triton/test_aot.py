"""Kernels compiled ahead of time: what each target can run, the same bytes whoever compiles."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import infc
from infc.codegen.base import EmitOptions
from infc.codegen.registry import get_backend
from infc.codegen.triton import aot
from infc.codegen.triton.aot import SHARED_BYTES, KernelBuild, check_kernel
from infc.codegen.triton.backend import generate
from infc.codegen.triton.calls import KernelCode, Tuning
from infc.ir.errors import ProgramError, TargetError, ToolchainError
from infc.ir.launches import LAUNCHES_FILE, Kernel, read_launches
from infc.ir.program import Program
from infc.ir.targets import CUDA, resolve_target
from infc.ir.types import DType

from ...gpu_breadth import RARELY
from ..harness import build, random_weights, with_weights
from ..op_cases import gates, norms, program_of, routing
from .shapes import SHAPES, layer
from .test_launches import CASES, plan, planned

SM_90 = resolve_target("sm_90")
ONE = KernelCode(
    "step",
    "resolve_carried",
    (("token_ids", "*i32"), ("carried", "*i32"), ("tokens_before", "*i32"), ("count", "i32")),
    frozenset(),
    (("BLOCK", 128),),
    Tuning(),
)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_each_kernel_of_a_small_model_fits(target: str, tmp_path: Path) -> None:
    _compile_all([planned(path) for path in CASES], target, tmp_path)


@pytest.mark.breadth
@pytest.mark.parametrize(
    "target",
    [
        one if one in ("sm_90", "sm_120") else pytest.param(one, marks=RARELY)
        for one in CUDA.targets
    ],
)
def test_each_kernel_fits_for_shapes_that_people_run(target: str, tmp_path: Path) -> None:
    _compile_all([plan(layer(shape)) for shape in SHAPES.values()], target, tmp_path)


def _compile_all(programs: Sequence[Program], target: str, place: Path) -> None:
    machine = resolve_target(target)
    codes = {k: code for one in programs for k, code in generate(one, machine).codes.items()}
    build = KernelBuild(codes, machine, place / "kernels")
    build.start()
    kernels = build.wait()
    assert kernels.keys() == codes.keys()
    for key, kernel in kernels.items():
        assert kernel.threads >= 32 and kernel.registers > 0
        ptx = (place / kernel.source.removeprefix("code/")).read_text()
        assert f".visible .entry {kernel.entry}(" in ptx
        assert f".target {target}" in ptx
        check_waits(ptx, dependent=codes[key].dependent)
    assert any(code.dependent for code in codes.values()) == (CUDA.capability(target) >= 90)


def check_waits(ptx: str, *, dependent: bool) -> None:
    """A dependent kernel waits before it touches memory that others write; others do not wait."""
    waits = [found.start() for found in re.finditer(r"griddepcontrol\.wait", ptx)]
    assert len(waits) == dependent
    touched = re.search(r"\b(ld|st|atom|red|cp\.async\S*)\.(global|\S+\.global)|cp\.async", ptx)
    assert touched is not None, "a kernel does something"
    # Nothing jumps over it: it stands in the first block of the kernel.
    assert not dependent or not re.search(r"^\$L__BB|\bbra\b", ptx[: waits[0]], re.MULTILINE)
    assert not dependent or waits[0] < touched.start()


def test_an_artifact_has_launches_kernels_and_weights(tmp_path: Path) -> None:
    program = program_of(gates, DType.F32)
    artifact = build(program, tmp_path / "a", SM_90, backend="triton")
    entry = artifact.manifest.main.entry
    assert (entry.kind, entry.file) == ("launches", LAUNCHES_FILE)
    plan = read_launches(artifact.read_text(entry.file), where="a")
    assert plan.target == "sm_90" and plan.toolchain == {"triton": aot.VERSION}
    assert artifact.manifest.main.arena_bytes == plan.arena_bytes
    for kernel in plan.kernels.values():
        assert (artifact.path / kernel.image).read_bytes()[:4] == b"\x7fELF"
        assert (artifact.path / kernel.source).is_file()
    used = {one.kernel for form in plan.forms for one in form.launches}
    assert used == plan.kernels.keys()


def test_the_same_bytes_from_another_place(tmp_path: Path) -> None:
    """Another copy of infc, another place for what is kept, another seed of hashes."""
    (package,) = infc.__path__
    copy = tmp_path / "some where/infc"
    ignored = shutil.ignore_patterns("__pycache__", "cpp", "recipes", "driver", "runtime", "passes")
    shutil.copytree(package, copy, ignore=ignored)
    results = []
    for place, root, seed in (("a", Path(package).parent, "1"), ("b", copy.parent, "2")):
        (tmp_path / place).mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "PYTHONHASHSEED": seed,
            "TRITON_CACHE_DIR": str(tmp_path / place / "kept"),
        }
        job = {"code": ONE.plain(), "capability": 90, "place": str(tmp_path / place / "one")}
        done = subprocess.run(
            [sys.executable, "-m", "infc.codegen.triton.worker"],
            input=json.dumps(job),
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        result = json.loads(done.stdout)
        files = [(tmp_path / place / f"one.{end}").read_bytes() for end in ("ptx", "cubin")]
        results.append((result, files))
    assert results[0] == results[1]
    ptx, cubin = results[0][1]
    assert b'.file\t1 "infc/kernels/step.py"' in ptx and b".loc\t1 " in ptx
    for data in (ptx, cubin):
        assert not any(str(path).encode() in data for path in (tmp_path, Path.home(), package))


def test_what_does_not_compile_is_named(tmp_path: Path) -> None:
    wrong = replace(ONE, parameters=ONE.parameters[1:])
    build = KernelBuild({"wrong": wrong, "right": ONE}, SM_90, tmp_path / "kernels")
    build.start()
    with pytest.raises(ToolchainError, match=r"cannot compile wrong for sm_90: TypeError: .*takes"):
        build.wait()
    build.stop()


@pytest.mark.parametrize(
    ("more_shared", "spilled", "message"),
    [
        (1, 0, "232449 bytes of shared memory"),
        (0, 72, "72 bytes of each thread in memory on sm_90"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused(
    more_shared: int, spilled: int, message: str
) -> None:
    most = SHARED_BYTES["sm_90"]
    kernel = Kernel("k", "k.cubin", "k.ptx", threads=128, shared_bytes=most)
    check_kernel("k", kernel, SM_90)
    kernel = replace(kernel, shared_bytes=most + more_shared, spilled_bytes=spilled)
    with pytest.raises(ToolchainError, match=message):
        check_kernel("k", kernel, SM_90)


def test_another_version_of_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.9.0")
    with pytest.raises(ToolchainError, match=r"Triton 3\.9\.0 is installed, .* made for 3\.6\.0"):
        get_backend("triton").toolchain(SM_90)
    (need,) = get_backend("triton").needs()
    assert not need.fine


def test_native_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend("triton")
    assert backend.find_target("sm_120") == resolve_target("sm_120")
    with pytest.raises(TargetError, match=r"triton does not compile for x86-64-v3 .*sm_80"):
        backend.find_target("x86-64-v3")


def test_what_is_not_built_is_refused() -> None:
    program = program_of(norms, DType.F32)
    backend = get_backend("triton")
    backend.check(program, SM_90)
    backend.check(program_of(routing, DType.BF16), SM_90)
    nodes = [replace(node, op="conv") if node.op == "neg" else node for node in program.nodes]
    with pytest.raises(ProgramError, match=r"refuses op 'conv': there is no kernel for it"):
        backend.check(replace(program, nodes=tuple(nodes)), SM_90)


def test_a_build_that_is_left_ends(tmp_path: Path) -> None:
    program = program_of(gates, DType.F32)
    program = with_weights(program, random_weights(program, seed=1))
    backend = get_backend("triton")
    with backend.begin(program, SM_90, tmp_path):
        pass
    emission = backend.emit(program, SM_90, tmp_path, EmitOptions())
    assert emission.entry["file"] == LAUNCHES_FILE
