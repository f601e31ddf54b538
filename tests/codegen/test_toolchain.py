"""The compiler's process: what fails is told in a line, and nothing of it outlives its call."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infc.codegen.cpp import toolchain
from infc.ir.errors import ToolchainError
from infc.ir.targets import resolve_target

Compiler = Callable[[str], None]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Makes `$CXX` a shell script that tells its version, else does what it is given."""

    def install(script: str) -> None:
        path = tmp_path / "cxx"
        version = '[ "$1" = --version ] && echo "cxx 1" && exit\n'
        path.write_text(f"#!/bin/sh\n{version}{script}\n")
        path.chmod(0o755)

    monkeypatch.setattr(
        toolchain, "find_toolchain", lambda: toolchain.Toolchain(str(tmp_path / "cxx"), "cxx 1")
    )
    return install


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a source."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/step.cpp").write_text("int x;\n")
    return tmp_path / "code"


def build(place: Path) -> None:
    toolchain.compile_library(place / "step.cpp", place / "step.so", resolve_target("x86-64-v2"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'step.cpp:1:2: error: no' >&2; exit 1", "the compiler failed: step.cpp:1:2"),
        ("printf 'a\\377 error\\n' >&2; exit 1", "the compiler failed: a\ufffd error"),
        ("kill -9 $$", "the compiler failed: no error message"),
        (
            "echo 'ld: final link failed: No space left on device' >&2; echo 'ld error' >&2;"
            " exit 1",
            r"the compiler could not write: ld: final link.* \(free some space",
        ),
    ],
)
def test_a_failure_is_told(compiler: Compiler, place: Path, script: str, message: str) -> None:
    compiler(script)
    with pytest.raises(ToolchainError, match=message):
        build(place)
    assert os.listdir(place) == ["step.cpp"]


def test_its_children_and_files_go_with_it(
    compiler: Compiler, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself runs others, which killing it alone would leave at work."""
    compiler("touch $TMPDIR/half.s; sleep 300 & echo $! > ../child; wait")
    monkeypatch.setattr(toolchain, "TIMEOUT_S", 1.0)
    with pytest.raises(ToolchainError, match=r"took more than 1\.0 s"):
        build(place)
    assert os.listdir(place) == ["step.cpp"]
    child = int((place.parent / "child").read_text())
    assert comes_true(lambda: has_ended(child)), "the compiler's child still runs"


def test_no_compiler_outlives_this_process(compiler: Compiler, place: Path) -> None:
    """Not even where it is killed outright, and nobody is left to end what it started."""
    compiler("sleep 300 & echo $! > ../part; mv ../part ../child; wait")
    script = (
        "import sys; from pathlib import Path\n"
        "from infc.codegen.cpp.toolchain import compile_library\n"
        "from infc.ir.targets import resolve_target\n"
        "place = Path(sys.argv[1])\n"
        "compile_library(place / 'step.cpp', place / 'step.so', resolve_target('x86-64-v2'))\n"
    )
    child = place.parent / "child"
    command = [sys.executable, "-c", script, str(place)]
    environment = {**os.environ, "CXX": str(place.parent / "cxx")}
    with subprocess.Popen(command, env=environment) as process:
        assert comes_true(child.exists)
        process.kill()
    assert comes_true(lambda: has_ended(int(child.read_text()))), "the compiler still runs"


def test_beside_other_work_it_ends_with_the_block(compiler: Compiler, place: Path) -> None:
    compiler("touch $TMPDIR/half.s; sleep 300 & echo $! > ../part; mv ../part ../child; wait")
    child = place.parent / "child"
    with in_background(place) as build:
        assert comes_true(child.exists)
        build.check()  # it is at work, and has not failed
    assert os.listdir(place) == ["step.cpp"]
    assert comes_true(lambda: has_ended(int(child.read_text()))), "the compiler still runs"


def test_beside_other_work_its_failure_is_told(compiler: Compiler, place: Path) -> None:
    """As soon as it is known, not when the other work is done."""
    compiler("echo 'step.cpp:1:2: error: no' >&2; exit 1")
    with in_background(place) as build:

        def has_failed() -> bool:
            try:
                build.check()
            except ToolchainError as error:
                return "step.cpp:1:2: error: no" in str(error)
            return False

        assert comes_true(has_failed)


def test_beside_other_work_it_is_waited_for(compiler: Compiler, place: Path) -> None:
    compiler("sleep 0.3; for last; do :; done; echo made > $last")
    with in_background(place) as build:
        build.wait()
        assert (place / "step.so").read_text() == "made\n"


def in_background(place: Path) -> toolchain.LibraryBuild:
    target = resolve_target("x86-64-v2")
    return toolchain.LibraryBuild(place / "step.cpp", place / "step.so", target)


def test_an_interrupt_that_comes_as_it_ends_stays_one(
    compiler: Compiler, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(subprocess.Popen[str]):
        def communicate(self, *arguments: Any, **options: Any) -> tuple[str, str]:
            super().communicate(*arguments, **options)
            raise KeyboardInterrupt

    compiler("exit 0")
    monkeypatch.setattr("subprocess.Popen", Late)
    with pytest.raises(KeyboardInterrupt):
        build(place)
    assert os.listdir(place) == ["step.cpp"]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or nothing but a status that nobody asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def comes_true(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether a condition holds before the time is over."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
