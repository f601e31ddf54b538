"""Compilations of the small Triton kernels, kept for the next run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from ..conftest import kept
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
