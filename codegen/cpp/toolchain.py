"""The system's C++ compiler: which one, its version, and one reproducible call of it."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...ir.errors import TargetError, ToolchainError
from ...ir.targets import ARM, X86, Family, Target, resolve_target
from .flags import compiler_flags

COMPILERS = ("g++", "c++", "clang++")
CROSS_COMPILERS = {ARM.name: "aarch64-linux-gnu-g++"}
MIN_VERSIONS = {"gcc": 12, "clang": 15}
FLAGS = (
    "-std=c++17",
    "-O3",
    # Sums are taken as written: see docs/design/reduction-order.md.
    "-ffp-contract=off",
    "-fno-fast-math",
    # Neither changes a value: nobody looks at floating-point exceptions or errno, and loops over
    # logarithms are vectorised only without them.
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    # Two builds of the same source are the same bytes, wherever they are made.
    "-Wl,--build-id=none",
    "-Wl,-s",
    "-frandom-seed=infc",
)
TIMEOUT_S = 600
_STOP_S = 0.1
"""How often a compilation beside other work looks whether it is still wanted."""
_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "File size limit")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler that was found: its path, and the first line it says of itself."""

    path: str
    version: str


@functools.cache
def find_toolchain() -> Toolchain:
    """`$CXX`, else the first of g++, c++ and clang++ on the path.

    Raises ToolchainError where there is none, naming packages that bring one.
    """
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else COMPILERS
    for name in names:
        path = shutil.which(name)
        if path:
            return Toolchain(path, _version(path))
    what = f"$CXX names {wanted!r}, which is not there" if wanted else "no C++ compiler was found"
    raise ToolchainError(
        what, hint="install one (Debian, Ubuntu: apt-get install g++) or set CXX to its path"
    )


@functools.cache
def find_cross_toolchain(family: Family) -> Toolchain:
    """The compiler for another kind of processor; ToolchainError where it is not on the path."""
    name = CROSS_COMPILERS[family.name]
    path = shutil.which(name)
    if path is None:
        raise ToolchainError(
            f"no C++ compiler for {family.name} was found",
            hint=f"install {name} (Debian, Ubuntu: apt-get install g++-aarch64-linux-gnu)",
        )
    return Toolchain(path, _version(path))


def toolchain_for(target: Target) -> Toolchain:
    """The compiler for a target: this machine's own, or one that crosses over."""
    return find_toolchain() if target.family is X86 else find_cross_toolchain(target.family)


def _version(path: str) -> str:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"the compiler {path} does not run: {error}") from error
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def compile_library(
    source: Path, library: Path, target: Target, stop: threading.Event | None = None
) -> Toolchain:
    """Compile one translation unit into a shared library.

    Runs inside the source's directory, so that no path of this machine gets into the binary.
    Raises ToolchainError with the compiler's first error, or once another thread sets `stop`.
    """
    toolchain = toolchain_for(target)
    directory = source.parent
    command = [
        toolchain.path,
        *FLAGS,
        *compiler_flags(target),
        f"-ffile-prefix-map={directory}=.",
        "-I.",
        source.name,
        "-o",
        os.path.relpath(library, directory),
    ]
    try:
        status, errors = _run(command, directory, stop)
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            f"{toolchain.path} took more than {TIMEOUT_S} s", where=source.name
        ) from error
    except OSError as error:
        raise ToolchainError(f"{toolchain.path} does not run: {error}") from error
    if status == 0:
        return toolchain
    if full := [line for line in errors.splitlines() if any(word in line for word in _FULL)]:
        raise ToolchainError(
            f"the compiler could not write: {full[0].strip()}",
            where=source.name,
            hint="free some space, or raise the limit on the size of a file (`ulimit -f`)",
        )
    raise ToolchainError(
        f"the compiler failed: {_first_error(errors)}",
        where=source.name,
        hint=f"the compiler is {toolchain.version}; infc needs gcc {MIN_VERSIONS['gcc']} or "
        f"clang {MIN_VERSIONS['clang']} or later",
    )


def try_compiler() -> Toolchain:
    """The compiler for this machine, once it has compiled a few lines; ToolchainError otherwise."""
    try:
        target = resolve_target("native")
    except TargetError:  # a machine that infc does not build for; its compiler may work
        target = resolve_target("x86-64-v2")
    with tempfile.TemporaryDirectory(prefix="infc-compiler-") as place:
        source = Path(place) / "probe.cpp"
        source.write_text(
            '#include <atomic>\n#include <thread>\nextern "C" int f() { return 0; }\n'
        )
        return compile_library(source, source.with_suffix(".so"), target)


# Waits beside the compiler for the end of a pipe that only this process holds open. However this
# process ends, the pipe ends with it, and the whole group with the pipe: compilers have children.
_GUARDED = (
    "exec 3<&0 4>&2 2>/dev/null; { exec 4>&-; read -r _ <&3; kill -s KILL 0; } & guard=$!;"
    ' "$@" </dev/null 2>&4 3<&- 4>&- & wait $!; status=$?; kill $guard; exit $status'
)


def _run(
    command: list[str], directory: Path, stop: threading.Event | None = None
) -> tuple[int, str]:
    """Exit status and stderr. However it ends, no process and no temporary file stays."""
    watched, held = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=directory) as scratch:
            environment = {**os.environ, "SOURCE_DATE_EPOCH": "0", "LC_ALL": "C", "TMPDIR": scratch}
            with subprocess.Popen(
                ["/bin/sh", "-c", _GUARDED, "sh", *command],
                cwd=directory,
                env=environment,
                stdin=watched,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a group that can be killed
            ) as process:
                try:
                    errors = _wait(process, stop)
                except BaseException:
                    with contextlib.suppress(ProcessLookupError):  # it had just ended
                        os.killpg(process.pid, signal.SIGKILL)
                    raise
    finally:
        os.close(watched)
        os.close(held)
    return process.returncode, errors


def _wait(process: subprocess.Popen[str], stop: threading.Event | None) -> str:
    """What the process said on stderr; ToolchainError once `stop` is set."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        left = deadline - time.monotonic()
        try:
            return process.communicate(timeout=left if stop is None else min(left, _STOP_S))[1]
        except subprocess.TimeoutExpired:
            if stop is not None and stop.is_set():
                raise ToolchainError("the compiler was stopped") from None
            if time.monotonic() >= deadline:
                raise


class LibraryBuild:
    """`compile_library` beside other work of this process; on leaving the block it has ended."""

    def __init__(self, source: Path, library: Path, target: Target) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="infc-compiler")
        self._done = self._pool.submit(compile_library, source, library, target, self._stop)

    def check(self) -> None:
        """ToolchainError where the compiler has failed already."""
        if self._done.done():
            self._done.result()

    def wait(self) -> None:
        """Returns when the library is there; ToolchainError where it could not be compiled."""
        self._done.result()

    def stop(self) -> None:
        """Ends the compiler where it still runs; returns when it and its files are gone."""
        self._stop.set()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines()
    return lines[0].strip() if lines else "no error message"
