"""Where the kernels read weights: mapped from the file, or in memory of the process's own."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...ir.errors import ArtifactError, CapacityError
from ...ir.safetensors import MappedSafetensors, read_header
from .address_space import (
    advise,
    map_file_at,
    map_memory_at,
    move_pages,
    reserve_addresses,
    unmap,
)
from .base import WeightPlacement
from .reserve import reserve

_LOG = logging.getLogger(__name__)

PIECE_BYTES: Final = 2 << 20
"""What is copied at once: a huge page."""


@dataclass(slots=True)
class _Ranges:
    """The addresses that copied weights own: where tensors are, and where pieces are made.

    A page that has moved leaves a hole in the second range, which the system may give to anything
    else, for instance to malloc: from then on, it is not ours to unmap. The pages that move are
    the first ones, so what is still owned there begins at `made + copied`.
    """

    base: int
    made: int
    span: int
    copied: int = 0

    @classmethod
    def reserve(cls, num_bytes: int) -> _Ranges:
        """Both ranges for a file of so many bytes, in whole pieces; OSError without memory."""
        span = -(-num_bytes // PIECE_BYTES) * PIECE_BYTES
        whole = 2 * span + PIECE_BYTES
        begin = reserve_addresses(whole)
        base = -(-begin // PIECE_BYTES) * PIECE_BYTES
        end = base + 2 * span
        for first, last in ((begin, base), (end, begin + whole)):
            if first < last:
                unmap(first, last - first)
        return cls(base, base + span, span)

    def move_piece(self) -> None:
        """Move the first piece that has not moved to where its tensors are."""
        move_pages(self.made + self.copied, self.base + self.copied, PIECE_BYTES)
        self.copied += PIECE_BYTES

    def unmap(self) -> None:
        """Give back what is owned."""
        unmap(self.base, self.span)
        if self.copied < self.span:
            unmap(self.made + self.copied, self.span - self.copied)


class CopiedWeights:
    """A safetensors file that is mapped, and copied piece by piece into memory of huge pages.

    The first step need not wait for the copy. A piece is read into a huge page, which then takes
    the place of the mapped ones: addresses stay, and so does what is read there. Raises
    CapacityError where the system promises no memory. `handle` is a descriptor of the file, which
    may be closed afterwards.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.entries, _, self._start = read_header(path, handle)
        self._size = os.fstat(handle).st_size
        try:
            self._ranges = _Ranges.reserve(self._size)
            self._unmap = _at_the_end_of(self, self._ranges.unmap)
            map_file_at(self._ranges.base, self._size, handle)
            self._file = os.dup(handle)
            self._close_file = _at_the_end_of(self, os.close, self._file)
            map_memory_at(self._ranges.made, self._ranges.span)
        except OSError as error:
            raise CapacityError(
                f"cannot allocate memory for the weights: {error}",
                where=str(path),
                hint="use weights=mapped",
            ) from error
        # All of it is needed in a moment; a disk reads it faster when told so.
        advise(self._ranges.base, self._size, mmap.MADV_WILLNEED)

    def address(self, name: str) -> int:
        """Where the tensor's first byte lies; ArtifactError where there is none."""
        entry = self.entries.get(name)
        if entry is None:
            raise ArtifactError("is not in the file", where=f"{self.path}: {name}")
        return self._ranges.base + self._start + entry.begin

    def copy(self, seconds: float) -> bool:
        """Copy pieces for about so long, one at least; whether any is left.

        Raises ArtifactError where the file has become shorter.
        """
        end = time.perf_counter() + seconds
        while self._close_file.alive:
            try:
                self._copy_piece()
            except OSError as error:  # what is mapped stays mapped: slower, and nothing else
                _LOG.warning(
                    "weights from %d MiB on stay mapped: %s", self._ranges.copied >> 20, error
                )
                self._close_file()
            if time.perf_counter() >= end:
                break
        return self._close_file.alive

    @property
    def taken_bytes(self) -> int:
        """What lies in memory of its own by now."""
        return self._ranges.copied

    def close(self) -> None:
        """Give the memory back."""
        self._close_file()
        self._unmap()

    def _copy_piece(self) -> None:
        ranges, at = self._ranges, self._ranges.copied
        count = min(PIECE_BYTES, self._size - at)
        piece = memoryview((ctypes.c_char * count).from_address(ranges.made + at)).cast("B")
        _read_into(piece, self._file, at, self.path)
        ranges.move_piece()
        if ranges.copied >= self._size:
            self._close_file()


class LoadedWeights(MappedSafetensors):
    """A safetensors file read into memory before the first step: nothing of it stays mapped.

    What is written to the file later is never seen, and a file cut short is no signal. Raises
    ArtifactError where it becomes shorter while it is read, CapacityError without memory.
    """

    taken_bytes = 0
    """What lies in memory of its own."""

    def _take(self, handle: int) -> mmap.mmap:
        size = self.taken_bytes = os.fstat(handle).st_size
        memory = reserve(size)
        _read_into(memoryview(memory)[:size], handle, 0, self.path)
        return memory


def open_weights(
    path: Path, handle: int, placement: WeightPlacement
) -> CopiedWeights | MappedSafetensors:
    """The weights in the file of that descriptor, which may be closed afterwards.

    A mapped file is shared with other processes, and lies in pages of 4 KiB on most systems; two
    cores read huge pages up to half faster.
    """
    match placement:
        case "mapped":
            return MappedSafetensors(path, handle)
        case "copied":
            return CopiedWeights(path, handle)
        case "loaded":
            return LoadedWeights(path, handle)


def _read_into(memory: memoryview, handle: int, at: int, path: Path) -> None:
    """Fills `memory` with the file's bytes from `at` on."""
    done = 0
    while done < len(memory):
        read = os.preadv(handle, [memory[done:]], at + done)
        if read == 0:
            raise ArtifactError("was truncated", where=str(path))
        done += read


def _at_the_end_of(
    owner: object, call: Callable[..., object], *args: int
) -> weakref.finalize[..., object]:
    """`call(*args)`, once: when it is called or the owner goes; not at the end of the process.

    A thread that never ends may be in a step then.
    """
    end = weakref.finalize(owner, call, *args)
    end.atexit = False
    return end
