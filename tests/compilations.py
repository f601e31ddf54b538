"""Compilations that tests share: what was compiled once, from the same text, is copied afterwards.

Half of the time that the tests took went to the compiler. Parsed headers are kept, and what is
compiled with them is, under a digest of all that it is made of; neither changes a byte of what
comes out. Generated steps are optimised less than the product's, see `QUICKER`. What else infc
compiles, such as the quantisers of each model in codes, is shared as it is, and kernels that are
compiled apart have the product's own store. Only calls inside the tests' own processes come here;
commands that tests start, to kill them or to compare their bytes, do without.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from infc.codegen.cpp import toolchain
from infc.codegen.cpp.units import FOLDER as UNITS

Run = Callable[[list[str], Path, threading.Event | None], tuple[int, str]]
"""As `toolchain._run`: a command and where it runs give its status and what it said."""

PARSED = "kernels/entry.hpp"
"""The header that generated sources begin with."""

OUTPUT = "output"

_ROOM = Path(toolchain.__file__).parent

QUICKER = {"-O3": "-O1"}
"""Of generated steps: what they compute does not depend on it (no contraction, no fast-math), and
compiling takes a third less. Tests with the fixture `as_shipped`, those of the kernels, and
commands that tests start have the product's options."""


@dataclass(frozen=True, slots=True)
class Compilations:
    """A directory of what was compiled and parsed, for any number of processes at once."""

    root: Path
    compile: Run

    def run(
        self,
        command: list[str],
        directory: Path,
        stop: threading.Event | None = None,
        *,
        quicker: bool = True,
    ) -> tuple[int, str]:
        """Compile, or copy what the same compilation gave before. What others wait for as well does
        not stop."""
        *options, source, _, output = command
        if not is_shared(directory, source):
            return self.compile(command, directory, stop)
        # Maps away the name of the directory, which is what makes libraries equal.
        options = [word for word in options if not word.startswith("-ffile-prefix-map=")]
        if quicker and is_generated(directory / source):
            options = [QUICKER.get(word, word) for word in options]
        kept, said = self._once(
            _digest(options, source, *_texts(directory)),
            lambda place: self._compile([*options, source], directory, place),
        )
        if kept is None:
            return 1, said
        shutil.copy(kept / OUTPUT, directory / output)
        return 0, said

    def _compile(self, words: list[str], directory: Path, place: Path) -> tuple[int, str]:
        *options, source = words
        shutil.copytree(directory, place / "code", ignore=shutil.ignore_patterns("*.so", ".*"))
        if is_generated(directory / source):
            kernels = directory / "kernels"
            headers, _ = self._once(
                _digest(options, *_texts(kernels)),
                lambda place: self._parse(options, kernels, place),
            )
            if headers is not None:
                shutil.rmtree(place / "code/kernels")
                (place / "code/kernels").symlink_to(headers / "kernels")
                options.append("-Winvalid-pch")
        prefix = f"-ffile-prefix-map={place / 'code'}=."
        done = self.compile([*options, prefix, source, "-o", f"../{OUTPUT}"], place / "code", None)
        shutil.rmtree(place / "code")
        return done

    def _parse(self, options: list[str], kernels: Path, place: Path) -> tuple[int, str]:
        """A copy of the kernels, and beside the first its parsed form, as gcc looks for it."""
        shutil.copytree(kernels, place / "kernels")
        other = "-shared", "-c"
        parse = [word for word in options if word not in other and not word.startswith("-Wl,")]
        return self.compile(
            [*parse, "-x", "c++-header", PARSED, "-o", f"{PARSED}.gch"], place, None
        )

    def _once(self, key: str, make: Callable[[Path], tuple[int, str]]) -> tuple[Path | None, str]:
        """The directory of that key, whole, made by the first who needs it; None if that fails."""
        place, said = self.root / key, ""
        with FileLock(self.root / f"{key}.lock"):
            if not place.exists():
                unfinished = Path(tempfile.mkdtemp(prefix=".", dir=self.root))
                try:
                    status, said = make(unfinished)
                    if status != 0:
                        return None, said
                    os.rename(unfinished, place)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
            os.utime(place)
        return place, said


def is_shared(directory: Path, source: str) -> bool:
    """Whether the compiler reads a source that tests compile again and again, not objects."""
    if not source.endswith(".cpp") or source.startswith(f"{UNITS}/"):
        return False
    return (directory / "kernels").is_dir() or is_shipped(directory / source)


def is_generated(source: Path) -> bool:
    """Whether a source is a step that the emitter wrote."""
    return f'#include "{PARSED}"' in source.read_text()


def is_shipped(source: Path) -> bool:
    """Whether a source is a copy of one that is part of infc."""
    return source.read_bytes() in {path.read_bytes() for path in _ROOM.rglob("*.cpp")}


def sweep(root: Path, max_bytes: int, spared_s: float = 3600) -> None:
    """Remove what was not used for longest, until the rest fits; what was just used stays."""
    now, total = time.time(), 0
    places = [path for path in root.iterdir() if path.is_dir()]
    for used, place in sorted(((path.stat().st_mtime, path) for path in places), reverse=True):
        total += sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        if total > max_bytes and now - used > spared_s:
            shutil.rmtree(place)
            (root / f"{place.name}.lock").unlink(missing_ok=True)


def _texts(directory: Path) -> list[str]:
    """Names and texts of all that may be read below a directory, but for comments.

    A line stays a line: the compiler may put its number into what it makes.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix in (".cpp", ".hpp", ".h"))
    texts = []
    for path in paths:
        lines = path.read_text().split("\n")
        code = ("" if line.lstrip().startswith("//") else line for line in lines)
        texts += [str(path.relative_to(directory)), "\n".join(code)]
    return texts


@functools.cache
def _environment(compiler: str) -> str:
    """The compiler and the system's headers: what else goes into each library."""
    source = f'#include "{PARSED}"\n'

    def ask(*words: str) -> str:
        command = [compiler, *words]
        return subprocess.run(
            command, input=source, capture_output=True, text=True, check=True
        ).stdout

    rule = ask("-std=c++17", f"-I{_ROOM}", "-M", "-x", "c++", "-")
    paths = [Path(compiler).resolve(), *(Path(word) for word in shlex.split(rule))]
    stamps = [(str(path), path.stat().st_mtime_ns) for path in paths if path.is_absolute()]
    return repr((ask("--version"), stamps))


def _digest(options: list[str], *parts: str) -> str:
    everything = [_environment(options[0]), repr(options), *parts]
    return hashlib.sha256("\0".join(everything).encode()).hexdigest()[:24]
