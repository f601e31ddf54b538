"""What an executor needs of a device: one protocol for NVIDIA's driver and for its emulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Device:
    """A device as its driver describes it.

    `capability` is the compute capability, such as (9, 0); `driver_version` the CUDA version that
    the driver supports, such as (13, 0). `shared_bytes` is what one block may use.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    shared_bytes: int
    num_processors: int
    driver_version: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A kernel that was loaded. `handle` is the driver's own; `threads` are those of a block."""

    entry: str
    handle: object
    threads: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class MatrixMap:
    """What a descriptor for the tensor memory accelerator is made of.

    A dense row-major array at `address`, outermost dimension first.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_bytes: int


class Driver(Protocol):
    """One device and one stream of work on it, which is carried out in the order of the calls.

    Between `begin_capture` and `end_capture`, launches are recorded instead. Every method raises
    `DeviceError` for what the driver reports; after an error of a kernel nothing works any more.
    """

    device: Device

    @property
    def stream(self) -> int:
        """The handle of the stream, for libraries that ask for work on it themselves."""
        ...

    def load(
        self, image: bytes, source: str, entry: str, threads: int, shared_bytes: int
    ) -> Function:
        """A kernel of machine code `image`; `source` is its PTX, which an emulation runs."""
        ...

    def allocate(self, num_bytes: int, name: str) -> int:
        """The address of so much memory, aligned to 256 bytes; its contents are undefined.

        CapacityError, which says what it was for (`name`), where there is too little.
        """
        ...

    def free(self, address: int) -> None:
        """Give memory back, once what was launched has ended."""
        ...

    def host_array(self, num_bytes: int) -> Bytes:
        """Memory of the host that copies can read while the host goes on (pinned)."""
        ...

    def free_host_array(self, array: Bytes) -> None:
        """Give such memory back, once copies that were asked for have ended."""
        ...

    def upload(self, address: int, source: Bytes) -> None:
        """Copy to the device. `source` must stay as it is until the copy has ended."""
        ...

    def download(self, target: Bytes, address: int) -> None:
        """Copy to the host; `target` has the bytes once an event recorded later has passed."""
        ...

    def fill(self, address: int, num_bytes: int, byte: int) -> None:
        """Set every byte."""
        ...

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy within the device's memory."""
        ...

    def descriptor(self, matrix: MatrixMap) -> bytes:
        """The 128 bytes that a kernel takes for a matrix."""
        ...

    def launch(
        self, function: Function, grid: Sequence[int], parameters: bytes, *, dependent: bool = False
    ) -> None:
        """Launch a kernel. `parameters` are its arguments one after the other, each aligned to its
        size (descriptors to 64 bytes)."""
        ...

    def begin_capture(self) -> None:
        """Record launches from now on."""
        ...

    def end_capture(self) -> object:
        """The graph of what was recorded."""
        ...

    def replay(self, graph: object) -> None:
        """Carry out all launches of a graph."""
        ...

    def record_event(self, *, timed: bool = False) -> object:
        """An event that passes when all that was asked for so far has been done."""
        ...

    def seconds_between(self, first: object, second: object) -> float:
        """The time between two `timed` events, both of which have passed."""
        ...

    def has_passed(self, event: object) -> bool:
        """Whether an event has passed."""
        ...

    def wait(self, event: object) -> None:
        """Wait until an event has passed; other threads may go on."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was asked for."""
        ...

    def close(self) -> None:
        """Give back everything; a second call does nothing."""
        ...
