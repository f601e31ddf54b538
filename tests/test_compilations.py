"""Compilations that tests share: the bytes are the compiler's own, and nothing stale is used."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infc.codegen.cpp import toolchain
from infc.codegen.cpp.quantizers import compiled_quantizers
from infc.ir.errors import ToolchainError
from infc.ir.schemes import SCHEMES
from infc.ir.targets import resolve_target

from .compilations import QUICKER, Compilations, sweep

SOURCE = """\
// One op of a step.
#include "kernels/entry.hpp"
namespace infc {
void step(const Team& t, const Model& m, const infc_step& s) {
  rms_norm<true>(t, s.hidden, 8, weight_at<float>(m.weights, 0, 0), s.logits, 8,
                               s.num_tokens, 1, 8, 1e-5f);
}
}
INFC_ENTRY(infc::step, 1, 64, 64, 1, 64)
"""

Build = Callable[..., bytes]
Count = Callable[[list[str], Path, threading.Event | None], tuple[int, str]]


@pytest.fixture
def sources() -> list[str]:
    """What the compiler itself was called for, in order."""
    return []


@pytest.fixture
def count(compilations: Compilations, sources: list[str]) -> Count:
    """The compiler itself, which notes what it is called for."""

    def count(command: list[str], directory: Path, stop: threading.Event | None) -> tuple[int, str]:
        sources.append(next(word for word in command if word.endswith("pp")))
        status, said = compilations.compile(command, directory, stop)
        assert "pch" not in said
        return status, said

    return count


@pytest.fixture
def shared(count: Count, tmp_path: Path) -> Compilations:
    """Nothing was compiled in it before."""
    (tmp_path / "kept").mkdir()
    return Compilations(tmp_path / "kept", count)


@pytest.fixture
def build(
    count: Count, shared: Compilations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Build:
    """Compiles a source in a directory of that name: the library's bytes."""

    def build(name: str, source: str = SOURCE, *, kernels: str = "", share: bool = True) -> bytes:
        place = tmp_path / name
        shutil.copytree(Path(toolchain.__file__).parent / "kernels", place / "kernels")
        with (place / "kernels/norms.hpp").open("a") as file:
            file.write(kernels)
        (place / "step.cpp").write_text(source)
        monkeypatch.setattr(toolchain, "_run", shared.run if share else count)
        toolchain.compile_library(place / "step.cpp", place / "step.so", resolve_target("native"))
        assert sorted(os.listdir(place)) == ["kernels", "step.cpp", "step.so"]
        return (place / "step.so").read_bytes()

    return build


def test_the_bytes_are_those_of_the_compiler(
    build: Build, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = build("shared")
    assert shared != build("product", share=False)
    monkeypatch.setattr(toolchain, "FLAGS", [QUICKER.get(word, word) for word in toolchain.FLAGS])
    assert shared == build("elsewhere", share=False)
    del sources[-2]
    assert sources == ["kernels/entry.hpp", "step.cpp", "step.cpp"]


def test_the_same_text_is_compiled_once(build: Build, sources: list[str]) -> None:
    first = build("first")
    assert build("second", SOURCE.replace("One op", "Another name")) == first
    assert sources == ["kernels/entry.hpp", "step.cpp"]
    assert build("other", SOURCE.replace("1e-5f", "1e-6f")) != first
    assert sources[2:] == ["step.cpp"]
    assert build("changed", kernels="inline int more() { return 1; }\n") == first
    assert sources[3:] == ["kernels/entry.hpp", "step.cpp"]


def test_quantisers_are_compiled_once(
    shared: Compilations, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_run", shared.run)
    matrix = torch.randn(3, 40)
    for _ in range(2):
        with compiled_quantizers(pytest.fail) as quantizers:
            made = quantizers.quantize("int8", matrix)
        expected = SCHEMES["int8"].quantize(matrix)
        assert all(map(torch.equal, made, expected))
    assert sources == ["quantize.cpp"]


def test_what_fails_is_told_each_time(build: Build, sources: list[str]) -> None:
    for name in ("first", "second"):
        with pytest.raises(ToolchainError, match="'stop' was not declared"):
            build(name, SOURCE.replace("s.num_tokens", "stop"))
    assert sources == ["kernels/entry.hpp", "step.cpp", "step.cpp"]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate(("now", "lately", "long_ago")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "library.so").write_bytes(bytes(100))
        then = (tmp_path / name).stat().st_mtime - 5000 * age
        os.utime(tmp_path / name, (then, then))
    sweep(tmp_path, max_bytes=200)
    assert sorted(os.listdir(tmp_path)) == ["lately", "now"]
    sweep(tmp_path, max_bytes=0)
    assert os.listdir(tmp_path) == ["now"]
