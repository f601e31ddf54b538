"""A driver without a device: kernels are Python functions, and nothing runs before it must."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infc.ir.errors import CapacityError, DeviceError
from infc.runtime.executors.gpu.driver import Bytes, Device, Function, MatrixMap

DEVICE = Device("Test GPU", (9, 0), 1 << 30, 1 << 30, 232448, 132, (13, 0))
POISON = 0x7F

_SIZES = {"P": 8, "i": 4, "f": 4}
_CODES = {"P": "Q", "i": "i", "f": "f"}


class Memory:
    """The device's memory: what lies outside every allocation cannot be read or written."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._arrays: dict[int, Bytes] = {}
        self._next = 1 << 20

    def add(self, num_bytes: int) -> int:
        """The address of memory that holds no meaning."""
        address = self._next
        self._next += -(-num_bytes // 256) * 256 + 4096
        self._bases.append(address)
        self._arrays[address] = np.full(num_bytes, POISON, np.uint8)
        return address

    def remove(self, address: int) -> None:
        self._bases.remove(address)
        del self._arrays[address]

    def view(self, address: int, num_bytes: int) -> Bytes:
        """The bytes there, which must be of one allocation."""
        place = bisect_right(self._bases, address) - 1
        assert place >= 0, f"{address:#x} is no address"
        base = self._bases[place]
        array = self._arrays[base]
        begin = address - base
        assert begin + num_bytes <= len(array), f"{address:#x} + {num_bytes} is outside"
        return array[begin : begin + num_bytes]

    def array(self, address: int, count: int, kind: Any = np.int32) -> NDArray[Any]:
        """`count` elements there."""
        return self.view(address, count * np.dtype(kind).itemsize).view(kind)

    @property
    def num_bytes(self) -> int:
        """What is allocated."""
        return sum(map(len, self._arrays.values()))


Kernel = Callable[..., None]
"""Called with the memory, the grid, and the arguments."""

KERNELS: dict[str, tuple[str, Kernel]] = {}
"""By entry: what its parameters are (P a pointer, i, f), and the function."""


def kernel(signature: str) -> Callable[[Kernel], Kernel]:
    """Register a function as a kernel of its name."""

    def register(function: Kernel) -> Kernel:
        KERNELS[function.__name__] = signature, function
        return function

    return register


def unpacked(signature: str, parameters: bytes) -> list[int | float]:
    """Arguments from the bytes that a kernel is launched with, two null pointers behind them."""
    text, at = "<", 0
    for code in (*signature, "P", "P"):
        gap = -at % _SIZES[code]
        text += f"{gap}x{_CODES[code]}" if gap else _CODES[code]
        at += gap + _SIZES[code]
    assert len(parameters) == at, f"{len(parameters)} bytes of parameters, expected {at}"
    *arguments, scratch, profile = struct.unpack(text, parameters)
    assert scratch == 0 and profile == 0
    return arguments


STREAM: Final = 77
"""What stands for the stream."""

Job = tuple[str, Callable[[], None]]


@dataclass(eq=False)
class LateDriver:
    """Carries out work only when somebody waits for it, so that what is touched too early shows.

    `calls` has what was asked for, by name. After `fail_kernels` further kernels the device is
    lost.
    """

    device: Device = DEVICE
    memory: Memory = field(default_factory=Memory)
    calls: list[str] = field(default_factory=list)
    fail_kernels: int | None = None
    is_closed: bool = False
    host_bytes: int = 0
    names: dict[int, str] = field(default_factory=dict)
    _queue: list[Job] = field(default_factory=list)
    _recorded: list[Job] | None = None
    _done: int = 0
    _asked: int = 0
    _lost: bool = False

    def load(
        self, image: bytes, source: str, entry: str, threads: int, shared_bytes: int
    ) -> Function:
        assert image == f"code of {entry}".encode() and source == f"text of {entry}"
        return Function(entry, KERNELS[entry], threads, shared_bytes)

    def allocate(self, num_bytes: int, name: str) -> int:
        assert num_bytes > 0
        if self.memory.num_bytes + num_bytes > self.device.free_bytes:
            raise CapacityError(f"no memory for {name}")
        address = self.memory.add(num_bytes)
        self.names[address] = name
        return address

    def free(self, address: int) -> None:
        assert self._done == self._asked, "memory is given back that steps in flight use"
        self.memory.remove(address)

    def host_array(self, num_bytes: int) -> Bytes:
        self.host_bytes += num_bytes
        return np.full(num_bytes, POISON, np.uint8)

    def free_host_array(self, array: Bytes) -> None:
        self.synchronize()
        self.host_bytes -= len(array)
        array.fill(POISON)

    def upload(self, address: int, source: Bytes) -> None:
        assert self._recorded is None, "a copy while a graph is recorded"
        target = self.memory.view(address, len(source))
        self._ask("upload", lambda: _copy(target, source))

    def download(self, target: Bytes, address: int) -> None:
        assert self._recorded is None, "a copy while a graph is recorded"
        source = self.memory.view(address, len(target))
        self._ask("download", lambda: _copy(target, source))

    def fill(self, address: int, num_bytes: int, byte: int) -> None:
        self._ask("fill", lambda: self.memory.view(address, num_bytes).fill(byte))

    @property
    def stream(self) -> int:
        return STREAM

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        to, of = (self.memory.view(address, num_bytes) for address in (target, source))
        self._ask("copy", lambda: _copy(to, of))

    def descriptor(self, matrix: MatrixMap) -> bytes:
        self.calls.append(f"descriptor {matrix.shape}")
        return matrix.address.to_bytes(8, "little") + bytes(120)

    def launch(
        self, function: Function, grid: Sequence[int], parameters: bytes, *, dependent: bool = False
    ) -> None:
        assert all(size >= 1 for size in grid) and 1 <= len(grid) <= 3
        signature, body = KERNELS[function.entry]
        arguments = unpacked(signature, parameters)
        self._ask(f"launch {function.entry}", lambda: self._run(body, tuple(grid), arguments))

    def _run(self, body: Kernel, grid: tuple[int, ...], arguments: list[int | float]) -> None:
        if self.fail_kernels is not None:
            self.fail_kernels -= 1
            if self.fail_kernels < 0:
                self._lost = True
                self._check()
        body(self.memory, grid, *arguments)

    def begin_capture(self) -> None:
        assert self._recorded is None
        self._recorded = []

    def end_capture(self) -> object:
        graph, self._recorded = self._recorded, None
        assert graph is not None
        self.calls.append(f"captured {len(graph)}")
        return graph

    def replay(self, graph: object) -> None:
        assert isinstance(graph, list) and self._recorded is None
        self._check()
        self.calls.append("replay")
        self._queue += graph
        self._asked += len(graph)

    def record_event(self, *, timed: bool = False) -> object:
        self._check()
        return self._asked

    def seconds_between(self, first: object, second: object) -> float:
        assert isinstance(first, int) and isinstance(second, int) and second <= self._done
        return 1e-6 * (second - first)

    def has_passed(self, event: object) -> bool:
        assert isinstance(event, int)
        return self._done >= event

    def wait(self, event: object) -> None:
        assert isinstance(event, int)
        self._check()
        while self._done < event:
            self._done += 1
            self._queue.pop(0)[1]()

    def synchronize(self) -> None:
        self.wait(self._asked)

    def close(self) -> None:
        self.is_closed = True

    def with_device(self, **changes: Any) -> LateDriver:
        """The same for another device."""
        self.device = replace(self.device, **changes)
        return self

    def _ask(self, name: str, run: Callable[[], None]) -> None:
        self._check()
        assert not self.is_closed
        self.calls.append(name)
        if self._recorded is not None:
            self._recorded.append((name, run))
            return
        self._queue.append((name, run))
        self._asked += 1

    def _check(self) -> None:
        if self._lost:
            raise DeviceError("the GPU was lost (CUDA_ERROR_DEVICE_LOST)")


def _copy(target: Bytes, source: Bytes) -> None:
    target[:] = source
