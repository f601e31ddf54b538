"""A driver whose device is emulated: it runs PTX, and notices what hosts do wrong."""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from infc.ir.errors import CapacityError, DeviceError
from infc.runtime.executors.gpu.driver import Bytes, Device, Function, MatrixMap

from .descriptors import ELEMENT_BYTES, encode
from .errors import EmulationError
from .launch import Launched, Program, entry_of, grid_of, run_launch
from .memory import Allocation, Memory

DEVICE: Final = Device(
    name="emulated",
    capability=(9, 0),
    memory_bytes=1 << 30,
    free_bytes=1 << 30,
    shared_bytes=232448,
    num_processors=4,
    driver_version=(13, 0),
)


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """A launch that was carried out. `graph` is the number of the graph that it is part of."""

    entry: str
    grid: tuple[int, int, int]
    dependent: bool
    graph: int | None
    num_steps: int


@dataclass(frozen=True, slots=True)
class _Launch:
    launched: Launched
    dependent: bool
    graph: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Upload:
    address: int
    source: Bytes
    checksum: int


@dataclass(frozen=True, slots=True, eq=False)
class _Download:
    target: Bytes
    address: int


@dataclass(frozen=True, slots=True)
class _Fill:
    address: int
    num_bytes: int
    byte: int


@dataclass(frozen=True, slots=True)
class _Copy:
    target: int
    source: int
    num_bytes: int


_Work = _Launch | _Upload | _Download | _Fill | _Copy


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Launches that were captured, with their parameters as they were."""

    number: int
    launches: tuple[_Launch, ...]


@dataclass(slots=True, eq=False)
class _Event:
    """Passes when so much of what was asked for has been done."""

    count: int
    polls: int = 0


@dataclass(slots=True)
class Faults:
    """What a test wants to fail, counted from now; None for nothing."""

    launch_calls: int | None = None
    """The call of `launch` (or `replay`) that is refused, counted from 0."""

    running: int | None = None
    """The launch after which the device is lost, counted from 0 as they are carried out."""

    allocations: int | None = None
    """The allocation that finds no memory, counted from 0."""


def _counted_down(number: int | None) -> tuple[int | None, bool]:
    """The number at the next chance, and whether this one is it."""
    if number is None:
        return None, False
    return (None, True) if number == 0 else (number - 1, False)


@dataclass(slots=True)
class Options:
    """How an emulated device behaves.

    Work is carried out as late as a device may: when an event is waited for, is asked for the
    `patience`-th time, or everything is. `checks_sources` refuses uploads whose source has changed
    since; without it, the device gets the new bytes.
    """

    patience: int = 2
    checks_sources: bool = True


_PROGRAMS: Final[dict[bytes, Program]] = {}
"""By the digest of their PTX: reading one takes longer than most launches."""


def program_of(source: str) -> Program:
    """A kernel that was read, once a process."""
    key = hashlib.sha256(source.encode()).digest()
    if key not in _PROGRAMS:
        _PROGRAMS[key] = Program(source)
    return _PROGRAMS[key]


def _checksum(source: Bytes) -> int:
    return zlib.crc32(np.ascontiguousarray(source).view(np.uint8).reshape(-1).data)


class EmulatedDriver:
    """`runtime/executors/gpu/driver.py: Driver`, without a device.

    What was wrong is in `violations` as well, should the caller swallow the error.
    """

    def __init__(self, device: Device = DEVICE, options: Options | None = None) -> None:
        self._total_bytes = device.memory_bytes
        self.device = device
        self.options = options or Options()
        self.faults = Faults()
        self.launches: list[LaunchRecord] = []
        self.violations: list[str] = []
        self.num_replays = 0
        self.num_uploaded_bytes = 0
        self._memory = Memory(min(device.memory_bytes, device.free_bytes))
        self._queue: list[_Work] = []
        self._done = 0
        self._capture: list[_Launch] | None = None
        self._num_graphs = 0
        self._unsettled: set[Allocation] | None = None
        """What kernels wrote that a dependent launch would have to wait for."""
        self._lost: str | None = None
        self._closed = False
        self._lock = threading.RLock()

    # --- kernels

    def load(
        self, image: bytes, source: str, entry: str, threads: int, shared_bytes: int
    ) -> Function:
        """A kernel of its PTX; what a device would refuse is refused. An image may be empty."""
        with self._call("a kernel is loaded"):
            try:
                program = program_of(source)
            except EmulationError as error:
                raise self._violation(f"the kernel {entry} cannot be emulated: {error}") from None
            module = program.module
            if entry_of(source) != entry or (image and entry.encode() not in image):
                raise DeviceError(
                    f"the image has no kernel {entry!r}; the PTX has {module.entry!r}"
                )
            self._check_target(module.target, entry)
            if threads != module.threads:
                raise DeviceError(
                    f"{entry} was compiled for blocks of {module.threads} threads, not {threads}"
                )
            if module.static_bytes + shared_bytes > self.device.shared_bytes:
                raise DeviceError(
                    f"{entry} takes {module.static_bytes + shared_bytes} bytes of shared memory, "
                    f"and a block may use {self.device.shared_bytes}"
                )
            return Function(entry, program, threads, shared_bytes)

    def _check_target(self, target: str, entry: str) -> None:
        """An image runs where it was made for, or on a later minor version unless it says `a`."""
        digits = target.removeprefix("sm_").rstrip("abf")
        made_for = (int(digits[:-1]), int(digits[-1]))
        capability = self.device.capability
        exact = target.endswith("a")
        fits = made_for[0] == capability[0] and made_for[1] <= capability[1]
        if not (made_for == capability if exact else fits):
            name = ".".join(map(str, capability))
            raise DeviceError(f"{entry} was compiled for {target}, and the device has {name}")

    def descriptor(self, matrix: MatrixMap) -> bytes:
        """The 128 bytes that a kernel takes for a matrix."""
        with self._call("a descriptor is made"):
            if self.device.capability < (9, 0):
                raise DeviceError("the device has no tensor memory accelerator")
            try:
                data = encode(matrix)
                size = int(np.prod(matrix.shape)) * ELEMENT_BYTES[matrix.dtype]
                self._memory.region(matrix.address, size)
            except EmulationError as error:
                raise self._violation(str(error)) from None
            return data

    def launch(
        self, function: Function, grid: Sequence[int], parameters: bytes, *, dependent: bool = False
    ) -> None:
        """Ask for a launch, or record it in a capture."""
        with self._call("a kernel is launched", capturing=True):
            program = function.handle
            assert isinstance(program, Program)
            self.faults.launch_calls, fails = _counted_down(self.faults.launch_calls)
            if fails:
                raise DeviceError(f"the launch of {function.entry} failed: injected by a test")
            if dependent and self.device.capability < (9, 0):
                raise DeviceError("the device has no programmatic dependent launch")
            expected = program.module.parameter_bytes
            if not expected <= len(parameters) <= -(-expected // 64) * 64:
                raise self._violation(
                    f"{function.entry} takes {expected} bytes of parameters, not {len(parameters)}"
                )
            try:
                whole = grid_of(grid)
            except EmulationError as error:
                raise self._violation(f"{function.entry}: {error}") from None
            launched = Launched(program, whole, bytes(parameters), function.shared_bytes)
            into = self._queue if self._capture is None else self._capture
            into.append(_Launch(launched, dependent))

    # --- memory

    def allocate(self, num_bytes: int, name: str) -> int:
        """The address of so much poisoned memory."""
        with self._call("memory is allocated"):
            self.faults.allocations, fails = _counted_down(self.faults.allocations)
            try:
                if fails:
                    raise MemoryError(name)
                address = self._memory.allocate(num_bytes, name)
            except MemoryError:
                raise CapacityError(
                    f"{name} takes {num_bytes} bytes of the device's memory, "
                    f"of which {self.device.free_bytes} are free"
                ) from None
            self._update_free()
            return address

    def free(self, address: int) -> None:
        """Give memory back, once what was launched has ended."""
        with self._call("memory is freed"):
            self._drain(len(self._queue))
            try:
                self._memory.free(address)
            except EmulationError as error:
                raise self._violation(str(error)) from None
            self._update_free()

    def _update_free(self) -> None:
        free = self._memory.num_bytes - self._memory.used_bytes
        self.device = replace(self.device, free_bytes=free)

    def allocations(self) -> tuple[Allocation, ...]:
        """What has not been given back."""
        return tuple(self._memory.allocations)

    def contents(self, address: int, num_bytes: int) -> Bytes:
        """The bytes of the device's memory themselves, for tests to read and to damage."""
        return self._memory.region(address, num_bytes)

    def host_array(self, num_bytes: int) -> Bytes:
        """Memory of the host."""
        with self._call("memory of the host is allocated"):
            return np.zeros(num_bytes, np.uint8)

    def free_host_array(self, array: Bytes) -> None:
        """Carry out what was asked for, which may read or write it; it may not be used any more."""
        self.synchronize()
        array.fill(0x5A)

    def upload(self, address: int, source: Bytes) -> None:
        """Ask for a copy, which reads its source when it is carried out."""
        with self._call("a copy is asked for"):
            self._region(address, source.nbytes, "an upload")
            checksum = _checksum(source) if self.options.checks_sources else 0
            self.num_uploaded_bytes += source.nbytes
            self._queue.append(_Upload(address, source, checksum))

    def download(self, target: Bytes, address: int) -> None:
        """Ask for a copy; its target is poisoned until it has been carried out."""
        with self._call("a copy is asked for"):
            self._region(address, target.nbytes, "a download")
            target[...] = 0xFF
            self._queue.append(_Download(target, address))

    def fill(self, address: int, num_bytes: int, byte: int) -> None:
        """Ask for bytes to be set."""
        with self._call("memory is filled"):
            self._region(address, num_bytes, "a fill")
            self._queue.append(_Fill(address, num_bytes, byte))

    @property
    def stream(self) -> int:
        """There is none that others could ask for work."""
        return 0

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Ask for a copy within the device's memory."""
        with self._call("a copy is asked for"):
            self._region(target, num_bytes, "a copy")
            self._region(source, num_bytes, "a copy")
            self._queue.append(_Copy(target, source, num_bytes))

    def _region(self, address: int, num_bytes: int, what: str) -> Bytes:
        try:
            return self._memory.region(address, num_bytes)
        except EmulationError as error:
            raise self._violation(f"{what}: {error}") from None

    @property
    def pending_uploads(self) -> int:
        """How many copies to the device have not been carried out."""
        return sum(isinstance(one, _Upload) for one in self._queue)

    # --- graphs

    def begin_capture(self) -> None:
        """Record launches from now on."""
        with self._call("a capture begins"):
            self._capture = []

    def end_capture(self) -> object:
        """The graph of what was recorded."""
        with self._call("a capture ends", capturing=True):
            if self._capture is None:
                raise self._violation("no capture has begun")
            launches, self._capture = self._capture, None
            number, self._num_graphs = self._num_graphs, self._num_graphs + 1
            return Graph(number, tuple(replace(one, graph=number) for one in launches))

    def replay(self, graph: object) -> None:
        """Ask for all launches of a graph."""
        with self._call("a graph is replayed"):
            assert isinstance(graph, Graph)
            self.faults.launch_calls, fails = _counted_down(self.faults.launch_calls)
            if fails:
                raise DeviceError("the launch of a graph failed: injected by a test")
            self.num_replays += 1
            self._queue += graph.launches

    # --- waiting

    def record_event(self, *, timed: bool = False) -> object:
        """An event that passes when all that was asked for so far has been done."""
        with self._call("an event is recorded"):
            return _Event(self._done + len(self._queue))

    def seconds_between(self, first: object, second: object) -> float:
        """A microsecond for each piece of work between two events."""
        with self._call("the time between events is asked for"):
            assert isinstance(first, _Event) and isinstance(second, _Event)
            if self._done < max(first.count, second.count):
                raise self._violation("the time is asked for before an event has passed")
            return 1e-6 * (second.count - first.count)

    def has_passed(self, event: object) -> bool:
        """Whether an event has passed; asking often enough makes it."""
        with self._call("an event is asked for"):
            assert isinstance(event, _Event)
            event.polls += 1
            if event.polls >= self.options.patience:
                self._drain(event.count - self._done)
            return self._done >= event.count

    def wait(self, event: object) -> None:
        """Carry out all that the event stands for."""
        with self._call("an event is waited for"):
            assert isinstance(event, _Event)
            self._drain(event.count - self._done)

    def synchronize(self) -> None:
        """Carry out all that was asked for."""
        with self._call("everything is waited for"):
            self._drain(len(self._queue))

    def close(self) -> None:
        """Give back everything; a second call does nothing."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._memory.close()

    # --- carrying out

    @contextmanager
    def _call(self, what: str, *, capturing: bool = False) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise self._violation(f"{what} after the device was closed")
            if self._lost is not None:
                raise DeviceError(self._lost)
            if self._capture is not None and not capturing:
                raise self._violation(f"{what} within a capture")
            yield

    def _violation(self, message: str) -> DeviceError:
        self.violations.append(message)
        return DeviceError(message)

    def _drain(self, count: int) -> None:
        run: dict[type, Callable[..., None]] = {
            _Launch: self._run_launch,
            _Upload: self._run_upload,
            _Download: self._run_download,
            _Fill: self._run_fill,
            _Copy: self._run_copy,
        }
        for _ in range(count):
            work = self._queue.pop(0)
            self._done += 1
            try:
                run[type(work)](work)
            except EmulationError as error:
                self._lost = str(error)
                raise self._violation(self._lost) from None
            if not isinstance(work, _Launch):
                self._unsettled = None

    def _run_launch(self, work: _Launch) -> None:
        launched = work.launched
        # A launch depends on kernels alone: after a copy it begins when that has ended.
        unsettled = self._unsettled if work.dependent else None
        self._memory.written.clear()
        steps = run_launch(launched, self._memory, unsettled=unsettled)
        self._unsettled = set(self._memory.written) | (unsettled or set())
        entry = launched.program.module.entry
        record = LaunchRecord(entry, launched.grid, work.dependent, work.graph, steps)
        self.launches.append(record)
        self.faults.running, fails = _counted_down(self.faults.running)
        if fails:
            self._lost = f"the device was lost in {entry}: injected by a test"
            raise DeviceError(self._lost)

    def _run_upload(self, work: _Upload) -> None:
        if self.options.checks_sources and _checksum(work.source) != work.checksum:
            region = self._memory.describe(work.address)
            raise EmulationError(f"the source of an upload to {region} changed before it was read")
        raw = work.source.view(np.uint8).reshape(-1)
        self._memory.region(work.address, raw.size)[:] = raw

    def _run_download(self, work: _Download) -> None:
        raw = work.target.view(np.uint8).reshape(-1)
        raw[:] = self._memory.region(work.address, raw.size)

    def _run_copy(self, work: _Copy) -> None:
        target = self._memory.region(work.target, work.num_bytes)
        target[...] = self._memory.region(work.source, work.num_bytes)

    def _run_fill(self, work: _Fill) -> None:
        self._memory.region(work.address, work.num_bytes)[:] = work.byte
