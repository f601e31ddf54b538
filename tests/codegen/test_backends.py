"""What the driver asks of a backend: what it depends on, and what it compiles beside artifacts."""

from __future__ import annotations

import pytest

from infc.codegen.cpp import quantizers
from infc.codegen.registry import get_backend
from infc.ir.targets import resolve_target


def test_the_compiled_backend_depends_on_its_compiler_and_rounds_in_compiled_code() -> None:
    backend = get_backend("cpp")
    assert backend.toolchain(resolve_target("x86-64-v2"))["version"]
    assert not backend.interprets
    with backend.rounding(pytest.fail) as compiled:
        assert {"int8", "int4"} < compiled.feedback.keys() < compiled.nearest.keys()


def test_the_reference_depends_on_nothing() -> None:
    backend = get_backend("reference")
    assert backend.toolchain(resolve_target("x86-64-v2")) == {}
    assert backend.interprets
    with backend.rounding(pytest.fail) as compiled:
        assert not compiled.nearest and not compiled.feedback


def test_without_a_place_to_compile_the_schemes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(log: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(quantizers, "compiled_quantizers", refuse)
    said: list[str] = []
    with get_backend("cpp").rounding(said.append) as compiled:
        assert not compiled.nearest and not compiled.feedback
    assert said == [f"{quantizers.NOT_COMPILED}: no space left"]
