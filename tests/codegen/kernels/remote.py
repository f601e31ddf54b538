"""Kernels of another kind of processor, in a process that an emulator runs.

Arrays are copied there for each call and back after it, so the tests are the same as for kernels
that this machine runs itself.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from infc.codegen.cpp.toolchain import find_cross_toolchain
from infc.ir.errors import ToolchainError
from infc.ir.targets import ARM

Array = NDArray[Any]

DRIVER = Path(__file__).with_name("remote.cpp")
EMULATOR = "qemu-aarch64"
LIBRARIES = Path("/usr/aarch64-linux-gnu")
ALLOCATE, WRITE, READ, FREE, CALL = range(5)


class RemoteLibrary:
    """A library of kernels behind an emulator."""

    def __init__(self, library: Path) -> None:
        command = [EMULATOR, "-L", str(LIBRARIES), str(_driver(library.parent)), str(library)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._resident: list[tuple[weakref.ref[Array], int]] = []

    def call(self, name: str, *args: object) -> int:
        """Calls an entry point with what arrays hold; afterwards they hold what it wrote."""
        arrays = {a.ctypes.data: a for a in args if isinstance(a, np.ndarray)}
        lent = {data: self._allocate(array) for data, array in arrays.items()}
        there = [(array, lent[data]) for data, array in arrays.items()] + self._living()
        for array, place in there:
            self._send(WRITE, place, array.nbytes)
            self._send_bytes(array.tobytes())
        reals = [a for a in args if isinstance(a, float)]
        whole = [_integer(a, lent) for a in args if not isinstance(a, float)]
        assert len(whole) <= 24 and len(reals) <= 8
        self._send(CALL)
        self._send_bytes(name.encode().ljust(64, b"\0"))
        self._send_bytes(struct.pack("24q", *whole, *[0] * (24 - len(whole))))
        self._send_bytes(struct.pack("8d", *reals, *[0.0] * (8 - len(reals))))
        result = int.from_bytes(self._receive(8), "little", signed=True)
        for array, place in there:
            self._send(READ, place, array.nbytes)
            got = np.frombuffer(self._receive(array.nbytes), np.uint8)
            array.reshape(-1).view(np.uint8)[:] = got
        for place in lent.values():
            self._send(FREE, place)
        return result

    def address(self, array: Array) -> int:
        """Where an array lies that others point into: it goes with each call while it lives."""
        for known, place in self._living():
            if known is array:
                return place
        self._resident.append((weakref.ref(array), self._allocate(array)))
        return self._resident[-1][1]

    def _living(self) -> list[tuple[Array, int]]:
        living = []
        for reference, place in list(self._resident):
            array = reference()
            if array is None:
                self._send(FREE, place)
                self._resident.remove((reference, place))
            else:
                living.append((array, place))
        return living

    def _allocate(self, array: Array) -> int:
        self._send(ALLOCATE, array.nbytes)
        return int.from_bytes(self._receive(8), "little")

    def _send(self, *words: int) -> None:
        self._send_bytes(struct.pack(f"{len(words)}Q", *words))

    def _send_bytes(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _receive(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        assert len(data) == size, f"the emulated process ended: {self._process.wait()}"
        return data


def _integer(value: object, lent: dict[int, int]) -> int:
    """An argument that goes as an integer; null for None."""
    if isinstance(value, np.ndarray):
        return lent[value.ctypes.data]
    assert value is None or isinstance(value, (int, np.integer))
    return 0 if value is None else int(value)


def skip_without_compiler() -> None:
    """Skips the test where nothing can be compiled for ARM."""
    try:
        find_cross_toolchain(ARM)
    except ToolchainError as error:
        pytest.skip(str(error))


def skip_without_tools() -> None:
    """Skips the test where kernels for ARM cannot be compiled or run."""
    skip_without_compiler()
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"no {EMULATOR} here (Debian, Ubuntu: apt-get install qemu-user)")


@cache
def _driver(directory: Path) -> Path:
    driver = directory / "remote"
    command = [find_cross_toolchain(ARM).path, "-O1", str(DRIVER), "-o", str(driver)]
    subprocess.run([*command, "-ldl"], check=True)
    return driver
