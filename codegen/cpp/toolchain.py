"""The system's C++ compiler: which one, its version, and one reproducible call of it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...ir.errors import ToolchainError
from ...ir.target import Target

COMPILERS = ("g++", "c++", "clang++")
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


def _version(path: str) -> str:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"the compiler {path} does not run: {error}") from error
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def compile_library(source: Path, library: Path, target: Target) -> Toolchain:
    """Compile one translation unit into a shared library.

    Runs inside the source's directory, so that no path of this machine gets into the binary.
    Raises ToolchainError with the compiler's first error.
    """
    toolchain = find_toolchain()
    directory = source.parent
    command = [
        toolchain.path,
        *FLAGS,
        *target.compiler_flags(),
        f"-ffile-prefix-map={directory}=.",
        "-I.",
        source.name,
        "-o",
        os.path.relpath(library, directory),
    ]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            f"{toolchain.path} took more than {TIMEOUT_S} s", where=source.name
        ) from error
    except OSError as error:
        raise ToolchainError(f"{toolchain.path} does not run: {error}") from error
    if done.returncode != 0:
        raise ToolchainError(
            f"the compiler failed: {_first_error(done.stderr)}",
            where=source.name,
            hint=f"it was {toolchain.version}; infc needs gcc {MIN_VERSIONS['gcc']} or "
            f"clang {MIN_VERSIONS['clang']} or later",
        )
    return toolchain


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines()
    return lines[0].strip() if lines else "it said nothing"
