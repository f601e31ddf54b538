"""Compiles kernels ahead of time: distinct ones only, by several processes, for one GPU."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Final

from ...ir.errors import ToolchainError
from ...ir.extras import TRITON
from ...ir.launches import Kernel
from ...ir.machine import available_cpus
from ...ir.targets import CUDA, Target
from ...ir.user_cache import cache_directory, make_private, refusal
from .calls import KernelCode

VERSION: Final = "3.6.0"
"""Of Triton. Others use other numbers of registers: the tables are checked with this one."""

SHARED_BYTES: Final = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
}
"""Shared memory that a block can have."""

MOST_SPILLED_BYTES: Final = 64
"""Of a thread. What a kernel keeps in memory for want of registers makes it slow."""


def triton_version() -> str:
    """The version of Triton; ToolchainError where it is missing, or not the one that is known."""
    TRITON.require("compiling for a GPU")
    found = metadata.version("triton")
    if found != VERSION:
        raise ToolchainError(
            f"Triton {found} is installed, and the kernels are made for {VERSION}",
            hint=TRITON.install,
        )
    return found


def kept_kernels() -> Path | None:
    """Where compiled kernels are kept between compilations; None where nothing can be."""
    place = cache_directory() / "triton"
    try:
        make_private(place)
    except OSError:
        return None
    return place if refusal(place) is None else None


@dataclass(slots=True)
class KernelBuild:
    """Kernels that are being compiled into a directory, beside other work."""

    codes: Mapping[str, KernelCode]
    target: Target
    directory: Path
    found: dict[str, Kernel] = field(default_factory=dict)
    _todo: list[str] = field(default_factory=list)
    _failure: ToolchainError | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> None:
        """Begin. Long ones come first, so that none is waited for alone at the end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._todo = sorted(self.codes, key=lambda key: (_weight(self.codes[key]), key))
        for _ in range(max(1, min(available_cpus(), len(self._todo)))):
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()

    def check(self) -> None:
        """Raise what a compilation failed with."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> Mapping[str, Kernel]:
        """All kernels, once they are compiled; ToolchainError for one that cannot be."""
        for thread in self._threads:
            thread.join()
        self.check()
        return {key: self.found[key] for key in self.codes}

    def stop(self) -> None:
        """End what still runs."""
        with self._lock:
            self._todo.clear()
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        with contextlib.ExitStack() as stack:
            worker: subprocess.Popen[str] | None = None
            while (key := self._next()) is not None:
                try:
                    if worker is None:
                        worker = stack.enter_context(_worker())
                        with self._lock:
                            self._processes.append(worker)
                    kernel = self._compile(worker, key)
                except ToolchainError as error:
                    with self._lock:
                        self._failure = self._failure or error
                        self._todo.clear()
                    return
                with self._lock:
                    self.found[key] = kernel

    def _next(self) -> str | None:
        with self._lock:
            return self._todo.pop() if self._todo else None

    def _compile(self, worker: subprocess.Popen[str], key: str) -> Kernel:
        job = {
            "code": self.codes[key].plain(),
            "capability": CUDA.capability(self.target.name),
            "place": str(self.directory / key),
        }
        line = _ask(worker, json.dumps(job))
        result: dict[str, Any] = json.loads(line) if line else {"error": "the compiler ended"}
        if "error" in result:
            message = f"Triton cannot compile {key} for {self.target}: {result['error']}"
            raise ToolchainError(message)
        folder = f"code/{self.directory.name}"
        kernel = Kernel(image=f"{folder}/{key}.cubin", source=f"{folder}/{key}.ptx", **result)
        check_kernel(key, kernel, self.target)
        return kernel


def check_kernel(key: str, kernel: Kernel, target: Target) -> None:
    """ToolchainError for a kernel that the target cannot run, or only slowly."""
    most = SHARED_BYTES[target.name]
    if kernel.shared_bytes > most:
        raise ToolchainError(
            f"{key} needs {kernel.shared_bytes} bytes of shared memory, and {target} has {most}",
            hint="a smaller tile in codegen/triton/tables is needed",
        )
    if kernel.spilled_bytes > MOST_SPILLED_BYTES:
        raise ToolchainError(
            f"{key} keeps {kernel.spilled_bytes} bytes of each thread in memory on {target}",
            hint="a smaller tile, or more warps, in codegen/triton/tables is needed",
        )


def _weight(code: KernelCode) -> int:
    """Which kernels take long to compile."""
    slow = ("draw_tokens", "attend_tiles", "attend_splits")
    return slow.index(code.function) + 1 if code.function in slow else 0


def _ask(worker: subprocess.Popen[str], line: str) -> str:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
    except OSError:
        return ""
    return worker.stdout.readline()


@contextlib.contextmanager
def _worker() -> Iterator[subprocess.Popen[str]]:
    """A process of `worker.py`, which imports the same infc as this one."""
    root = str(Path(sys.modules[__name__.partition(".")[0]].__path__[0]).parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_INTERPRET": "0",
    }
    if (place := kept_kernels()) is not None:
        environment["TRITON_CACHE_DIR"] = str(place)
    package = __name__.rpartition(".")[0]
    process = subprocess.Popen(
        [sys.executable, "-m", f"{package}.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        streams: tuple[IO[str] | None, ...] = (process.stdin, process.stdout)
        for stream in streams:
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.wait()
