"""Compilations of the small Triton kernels, kept for the next run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from ..conftest import kept
from .running import Compiled

Compile = Callable[..., Compiled]


@pytest.fixture(scope="session")
def compile_triton(pytestconfig: pytest.Config) -> Compile:
    """Compiles a kernel of `kernels.py` for a capability, such as 90; skips without Triton."""
    reason = "Triton is not installed, which compiles kernels for the emulation"
    triton = pytest.importorskip("triton", reason=reason)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import kernels

    folder = kept(pytestconfig, "triton")

    def compile_(
        name: str, capability: int, types: dict[str, str], constants: dict[str, Any], **options: Any
    ) -> Compiled:
        function = getattr(kernels, name)
        names = function.arg_names
        signature = {one: types.get(one, "constexpr") for one in names}
        pointers = [place for place, one in enumerate(names) if signature[one].startswith("*")]
        aligned = [place for place, one in enumerate(names) if one in ("K", "N")] + pointers
        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place in aligned
            if signature[names[place]] != "constexpr"
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "TRITON_CACHE_DIR", str(folder))
            patch.delitem(os.environ, "TRITON_INTERPRET", raising=False)
            compiled = triton.compile(
                ASTSource(function, signature, constants, attributes),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": 4, "num_stages": 3, **options},
            )
        text = compiled.asm["ptx"]
        threads = int(text.partition(".reqntid")[2].split()[0])
        return Compiled(text, name, threads, compiled.metadata.shared)

    return compile_
