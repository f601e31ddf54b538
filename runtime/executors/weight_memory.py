"""Where the kernels read weights: mapped from the file, or copied into memory of huge pages."""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ...ir.errors import ArtifactError, CapacityError
from ...ir.safetensors import MappedSafetensors, read_header
from .reserve import reserve

_READERS = 4
_GRAIN_BYTES = 2 << 20  # a huge page is filled by one reader


class WeightMemory(Protocol):
    """The tensors of a file of weights, at addresses that hold until `close`."""

    def address(self, name: str) -> int:
        """Where the tensor's first byte lies; CheckpointError where there is none."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def open_weights(path: Path, *, copied: bool) -> WeightMemory:
    """The weights in `path`, read into memory of their own if `copied`, else mapped.

    A mapped file is shared with other processes and costs no time, and lies in pages of 4 KiB on
    most systems; two cores read huge pages up to half faster.
    """
    return CopiedWeights(path) if copied else MappedSafetensors(path)


class CopiedWeights:
    """A safetensors file read into private memory, in huge pages where the kernel gives them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, _, self._start = read_header(path)
        size = path.stat().st_size
        try:
            self._memory = reserve(size)
            self._read(size)
        except OSError as error:
            raise CapacityError(
                f"cannot read the weights into memory: {error}",
                where=str(path),
                hint="take weights=mapped",
            ) from error
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def _read(self, size: int) -> None:
        view = memoryview(self._memory)
        # In few calls: between two of them a reader may have to wait for whoever holds Python.
        share = -(-size // (_READERS * _GRAIN_BYTES)) * _GRAIN_BYTES
        with open(self.path, "rb") as file, ThreadPoolExecutor(_READERS) as readers:

            def fill(start: int) -> None:
                stop = min(start + share, size)
                while start < stop:
                    count = os.preadv(file.fileno(), [view[start:stop]], start)
                    if count == 0:
                        raise ArtifactError("was cut short", where=str(self.path))
                    start += count

            list(readers.map(fill, range(0, size, share)))

    def address(self, name: str) -> int:
        """Where the tensor's first byte lies; ArtifactError where there is none."""
        entry = self._entries.get(name)
        if entry is None:
            raise ArtifactError("is not in the file", where=f"{self.path}: {name}")
        return self._base + self._start + entry.begin

    def close(self) -> None:
        """Give the memory back."""
        self._memory = mmap.mmap(-1, 1)
