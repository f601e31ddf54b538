"""Kernels that are compiled apart: once for a target, with the same bytes, and nothing stale."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from infc.codegen.cpp import toolchain
from infc.codegen.cpp.objects import ObjectStore, object_key
from infc.codegen.cpp.units import declarations, unit_sources
from infc.ir.errors import ToolchainError
from infc.ir.targets import resolve_target

from ..compilations import Compilations

LINEAR = "linear<float, float, float, float>"
NARROW = "linear<float, float, bf16, bf16>"
STEP = """\
#include "kernels/entry.hpp"
namespace infc {
DECLARED
void step(const Team& t, const Model& m, const infc_step& s) {
  linear<float, float, float, float>(t, s.hidden, 8, weight_at<char>(m.weights, 0, 0), nullptr,
                                     s.logits, 8, s.num_tokens, 8, 8);
  linear<float, float, bf16, bf16>(t, s.hidden, 8, weight_at<char>(m.weights, 0, 0), nullptr,
                                   reinterpret_cast<bf16*>(m.arena), 8, s.num_tokens, 8, 8);
}
}
INFC_ENTRY(infc::step, 1, 4096, infc::product_scratch_bytes<float>(8), 1, 64)
"""

Build = Callable[..., bytes]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty one, which the toolchain uses."""
    store = ObjectStore(tmp_path / "store")
    monkeypatch.setattr(toolchain, "kept_objects", lambda: store)
    return store


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that the compiler was called for since."""
    sources: list[str] = []
    run = toolchain._run

    def note(command: list[str], directory: Path, stop: threading.Event) -> tuple[int, str]:
        sources.extend(word for word in command if word.endswith(".cpp"))
        return run(command, directory, stop)

    monkeypatch.setattr(toolchain, "_run", note)
    return sources


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Compiles a step with two kernels in a directory of that name: the library's bytes."""

    def build(name: str, target: str = "native", *, more: str = "", broken: str = "") -> bytes:
        place = tmp_path / name
        kernels = Path(toolchain.__file__).parent / "kernels"
        shutil.copytree(kernels, place / "kernels")
        with (place / "kernels/linear.hpp").open("a") as file:
            file.write(more)
        declared = declarations([NARROW, LINEAR])
        (place / "step.cpp").write_text(STEP.replace("DECLARED\n", declared))
        (place / "units").mkdir()
        for path, text in unit_sources([NARROW, LINEAR]).items():
            (place / path).write_text(text + (broken if "bf16" in path else ""))
        try:
            library = place / "step.so"
            toolchain.compile_library(place / "step.cpp", library, resolve_target(target))
        finally:
            assert set(os.listdir(place)) <= {"kernels", "units", "step.cpp", "step.so"}
        return library.read_bytes()

    return build


def kernels_of(sources: list[str]) -> list[str]:
    """Those of the sources that are kernels; what was listed is forgotten."""
    found = sorted(Path(source).stem for source in sources if source.startswith("units/"))
    sources.clear()
    return found


BOTH = ["linear-float-float-bf16-bf16", "linear-float-float-float-float"]


def test_a_kernel_is_compiled_once_for_a_target(
    build: Build, store: ObjectStore, compiled: list[str]
) -> None:
    first = build("first")
    assert kernels_of(compiled) == BOTH
    assert build("second") == first
    assert kernels_of(compiled) == []
    assert build("elsewhere", "x86-64-v2") != first
    assert kernels_of(compiled) == BOTH
    build("changed", more="inline int more() { return 1; }\n")
    assert kernels_of(compiled) == BOTH
    assert build("third") == first
    assert kernels_of(compiled) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "open to others", "a directory"])
def test_what_may_not_be_used_is_compiled_again(
    damage: str, build: Build, store: ObjectStore, compiled: list[str]
) -> None:
    first = build("first")
    kernels_of(compiled)
    for path in store.directory.iterdir():
        data = path.read_bytes()
        match damage:
            case "cut":
                path.write_bytes(data[:-1])
            case "changed":
                path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
            case "empty":
                path.write_bytes(b"")
            case "open to others":
                path.chmod(0o666)
            case _:
                path.unlink()
                path.mkdir()
    assert build("second") == first
    assert kernels_of(compiled) == BOTH
    if damage != "a directory":
        assert build("third") == first
        assert kernels_of(compiled) == []


def test_a_store_that_others_can_write_to_is_not_read(store: ObjectStore) -> None:
    store.keep("a", b"object")
    assert store.find("a") == b"object"
    store.directory.chmod(0o777)
    assert store.find("a") is None
    store.keep("b", b"other")  # closes it
    assert store.find("b") == b"other"


def test_no_store_is_no_failure(tmp_path: Path, build: Build, store: ObjectStore) -> None:
    store.directory.write_text("a file where a directory should be")
    assert build("first") == build("second")


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "store", most_bytes=3 * (32 + 100))
    for age, name in enumerate(("newest", "middle", "oldest")):
        store.keep(name, bytes(100))
        os.utime(store.directory / name, (10**9 - age, 10**9 - age))
    assert store.find("oldest") is not None  # which is a use
    store.keep("another", bytes(100))
    assert sorted(os.listdir(store.directory)) == ["another", "newest", "oldest"]
    store.keep("huge", bytes(1000))
    assert os.listdir(store.directory) == ["huge"]
    (store.directory / "odd").mkdir()
    store.keep("last", bytes(1000))
    assert sorted(os.listdir(store.directory)) == ["last", "odd"]


def test_a_kernel_that_does_not_compile_is_named(build: Build, store: ObjectStore) -> None:
    with pytest.raises(ToolchainError, match=r"linear-float-float-bf16-bf16\.cpp") as caught:
        build("broken", broken="int broken = missing;\n")
    assert "'missing' was not declared" in str(caught.value)


def test_where_a_part_fails_the_others_are_stopped(
    tmp_path: Path,
    store: ObjectStore,
    compilations: Compilations,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is that of the part, and no compiler and no file is left."""
    monkeypatch.setattr(toolchain, "_run", compilations.compile)
    script = (
        "#!/bin/sh\ncase \"$*\" in\n*bad.cpp*) echo 'bad.cpp:1:1: error: no' >&2; exit 1;;\n"
        "*' -M '*) exit 1;;\nesac\n"
        f"sleep 300 & echo $! >> {tmp_path}/children; wait\n"
    )
    (tmp_path / "cxx").write_text(script)
    (tmp_path / "cxx").chmod(0o755)
    found = toolchain.Toolchain(str(tmp_path / "cxx"), "cxx 1")
    monkeypatch.setattr(toolchain, "find_toolchain", lambda: found)
    place = tmp_path / "code"
    for folder in ("kernels", "units"):
        (place / folder).mkdir(parents=True)
    for name in ("step.cpp", "units/bad.cpp", "units/good.cpp"):
        (place / name).write_text("int x;\n")
    with pytest.raises(ToolchainError, match=r"bad\.cpp:1:1: error: no"):
        toolchain.compile_library(
            place / "step.cpp", place / "step.so", resolve_target("x86-64-v2")
        )
    assert sorted(os.listdir(place)) == ["kernels", "step.cpp", "units"]
    for child in (tmp_path / "children").read_text().split():
        assert not Path(f"/proc/{child}").exists() or is_zombie(int(child))


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_key_tells_apart_what_is_compiled() -> None:
    one, other = ("one.hpp", b"a"), ("other.hpp", b"b")
    key = object_key(["-O3"], "gcc 12", [one, other])
    assert key == object_key(["-O3"], "gcc 12", [one, other])
    others = [
        object_key(["-O2"], "gcc 12", [one, other]),
        object_key(["-O3"], "gcc 13", [one, other]),
        object_key(["-O3"], "gcc 12", [("one.hpp", b"ab")]),
        object_key(["-O3"], "gcc 12", [("one.hpp", b"b"), ("other.hpp", b"a")]),
        object_key(["-O3"], "gcc 12", [("first.hpp", b"a"), other]),
    ]
    assert len({key, *others}) == 6


def test_headers_that_the_environment_brings_are_told_apart(
    build: Build,
    store: ObjectStore,
    compiled: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build("first")
    kernels_of(compiled)
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers/cstring").write_text("#include_next <cstring>\n#define FURTHER 1\n")
    monkeypatch.setenv("CPATH", str(tmp_path / "headers"))
    toolchain._identity.cache_clear()
    try:
        build("second")
    finally:
        toolchain._identity.cache_clear()
    assert kernels_of(compiled) == BOTH


def test_a_compiler_that_is_gone_is_told(
    build: Build, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = toolchain.Toolchain(str(tmp_path / "no-compiler"), "cxx 1")
    monkeypatch.setattr(toolchain, "find_toolchain", lambda: gone)
    with pytest.raises(ToolchainError, match="no-compiler"):
        build("first")


def test_a_store_that_is_only_read_from_is_used(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.keep("a", b"object")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert store.find("a") == b"object"
