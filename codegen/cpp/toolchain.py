"""The system's C++ compiler: which one, its version, and one reproducible call of it."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...ir.errors import TargetError, ToolchainError
from ...ir.machine import available_cpus
from ...ir.targets import ARM, X86, Family, Target, resolve_target
from .flags import compiler_flags
from .objects import kept_objects, object_key
from .units import FOLDER as UNITS

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
_STOPPED = "the compiler was stopped"
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
    """Compile a source, and the kernels in `units/` beside it, into a shared library.

    Kernels that this compiler has compiled for this target before are taken from the store of
    `objects.py`; the bytes are the same. Runs inside the source's directory, so that no path of
    this machine gets into the binary. Raises ToolchainError with the compiler's first error, or
    once another thread sets `stop`; where a part fails, it is set for the others.
    """
    toolchain = toolchain_for(target)
    build = _Build(toolchain, source.parent, compiler_flags(target), stop or threading.Event())
    units = sorted(path.relative_to(source.parent) for path in source.parent.glob(f"{UNITS}/*.cpp"))
    output = os.path.relpath(library, source.parent)
    if not units:
        build.run([*FLAGS, *build.options, "-I.", source.name, "-o", output], source.name)
        return toolchain
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=source.parent) as scratch:
        objects = build.compile_all([Path(source.name), *units], Path(scratch).name)
        build.run([*FLAGS, *objects, "-o", output], source.name)
    return toolchain


@dataclass(frozen=True, slots=True)
class _Build:
    """The commands that make one library, in its directory."""

    toolchain: Toolchain
    directory: Path
    flags: tuple[str, ...]
    stop: threading.Event

    @property
    def options(self) -> list[str]:
        return [*self.flags, f"-ffile-prefix-map={self.directory}=."]

    def compile_all(self, sources: Sequence[Path], place: str) -> list[str]:
        """Compile the step and its units, as many at once as there are processors: the objects.

        Where one fails, the others are stopped.
        """
        objects = [f"{place}/{path.stem}.o" for path in sources]
        with ThreadPoolExecutor(available_cpus(), thread_name_prefix="infc-compiler") as pool:
            try:
                step, *units = zip(sources, objects, strict=True)
                running = [pool.submit(self._compile, *map(str, step))]
                running += [pool.submit(self._unit, *unit) for unit in units]
                for one in as_completed(running):
                    one.result()
            except BaseException:
                self.stop.set()
                raise
        return objects

    def _unit(self, source: Path, output: str) -> None:
        """Compile a kernel, unless it was compiled before."""
        identity = _identity(self.toolchain, self.flags)
        if identity is None:
            self._compile(str(source), output)
            return
        store = kept_objects()
        texts = [self.directory / source, *sorted((self.directory / "kernels").glob("*.hpp"))]
        key = object_key(
            [*FLAGS, *self.flags], identity, ((path.name, path.read_bytes()) for path in texts)
        )
        found = store.find(key)
        if found is not None:
            (self.directory / output).write_bytes(found)
            return
        self._compile(str(source), output)
        store.keep(key, (self.directory / output).read_bytes())

    def _compile(self, source: str, output: str) -> None:
        words = [word for word in FLAGS if word != "-shared" and not word.startswith("-Wl,")]
        self.run([*words, *self.options, "-I.", "-c", source, "-o", output], source)

    def run(self, words: list[str], source: str) -> None:
        """Run the compiler; ToolchainError where it fails, or takes too long."""
        path = self.toolchain.path
        if self.stop.is_set():
            raise ToolchainError(_STOPPED)
        try:
            status, errors = _run([path, *words], self.directory, self.stop)
        except subprocess.TimeoutExpired as error:
            raise ToolchainError(f"{path} took more than {TIMEOUT_S} s", where=source) from error
        except OSError as error:
            raise ToolchainError(f"{path} does not run: {error}") from error
        if status == 0:
            return
        if full := [line for line in errors.splitlines() if any(word in line for word in _FULL)]:
            raise ToolchainError(
                f"the compiler could not write: {full[0].strip()}",
                where=source,
                hint="free some space, or raise the limit on the size of a file (`ulimit -f`)",
            )
        raise ToolchainError(
            f"the compiler failed: {_first_error(errors)}",
            where=source,
            hint=f"the compiler is {self.toolchain.version}; infc needs "
            f"gcc {MIN_VERSIONS['gcc']} or clang {MIN_VERSIONS['clang']} or later",
        )


@functools.cache
def _identity(toolchain: Toolchain, flags: tuple[str, ...]) -> str | None:
    """What objects depend on beside texts and options: the compiler, and the headers that it finds.

    These follow from the environment too, such as `$CPATH`. None where it cannot be told.
    """
    kernels = str(Path(__file__).parent / "kernels")

    def ask(*words: str, text: str = "") -> str:
        command = [toolchain.path, *words]
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=30, check=True
        ).stdout

    try:
        headers = ["-std=c++17", *flags, f"-I{kernels}", "-M", "-x", "c++", "-"]
        rule = ask(*headers, text='#include "entry.hpp"\n')
        programs = [ask(f"-print-prog-name={name}").strip() for name in ("cc1plus", "as")]
    except (OSError, subprocess.SubprocessError):
        return None
    found = {os.path.realpath(toolchain.path), *(shutil.which(one) or one for one in programs)}
    found |= {path for path in shlex.split(rule) if not path.startswith(kernels)}
    states = [(path, os.stat(path)) for path in sorted(found) if os.path.isfile(path)]
    stamps = [(path, state.st_size, state.st_mtime_ns) for path, state in states]
    return repr((toolchain.path, toolchain.version, stamps))


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
                raise ToolchainError(_STOPPED) from None
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
