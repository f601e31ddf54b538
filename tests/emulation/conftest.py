"""Compilations of the small Triton kernels, kept for the next run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from infc.codegen.triton import aot

from ..conftest import kept
from ..e2e.builds import Builds
from .compiling import Compiler
from .running import Compiled

Compile = Callable[..., Compiled]


@pytest.fixture(scope="session")
def compile_triton(pytestconfig: pytest.Config) -> Iterator[Compile]:
    """Compiles a kernel of `kernels.py` for a capability, such as 90; skips without Triton."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed, which compiles kernels for the emulation")
    folder = kept(pytestconfig, "triton")
    compilers: dict[int, Compiler] = {}

    def compile_(
        name: str, capability: int, types: dict[str, str], constants: dict[str, Any], **options: Any
    ) -> Compiled:
        if capability not in compilers:
            compilers[capability] = Compiler(folder, dict(os.environ))
        question = {"name": name, "capability": capability, "types": types}
        question |= {"constants": constants, "options": options}
        answer = compilers[capability].ask(question)
        threads = int(answer["source"].partition(".reqntid")[2].split()[0])
        return Compiled(answer["source"], name, threads, answer["shared_bytes"])

    yield compile_
    for compiler in compilers.values():
        compiler.close()


@pytest.fixture(scope="session")
def builds(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Builds]:
    """The checkpoints and artifacts of this run; kernels are kept for the next."""
    root = tmp_path_factory.getbasetemp()
    place = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "builds"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "kept_kernels", lambda: kept(pytestconfig, "triton"))
        yield Builds(place)
