"""Mappings at chosen addresses, which Python's `mmap` cannot make: Linux's calls, by ctypes."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_FAILED = ctypes.c_void_p(-1).value


def reserve_addresses(num_bytes: int) -> int:
    """The start of a range that nothing else will be mapped into, and that cannot be read yet."""
    return _map(None, num_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)


def map_file_at(address: int, num_bytes: int, descriptor: int) -> None:
    """Map the first `num_bytes` of a file to be read at `address`, over what is there."""
    _map(address, num_bytes, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, descriptor)


def map_memory_at(address: int, num_bytes: int) -> None:
    """Zeroed private memory at `address`, over what is there, in huge pages where allowed."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    _map(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)
    advise(address, num_bytes, mmap.MADV_HUGEPAGE)


def move_pages(source: int, target: int, num_bytes: int) -> None:
    """Move what is mapped at `source` over what is mapped at `target`, which goes.

    At no moment is there nothing at `target`: another thread that reads there finds the old or
    the new, and waits in between (mremap(2), MREMAP_FIXED).
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
    if _libc.mremap(source, num_bytes, num_bytes, flags, target) in (None, _FAILED):
        raise _error("mremap")


def advise(address: int, num_bytes: int, advice: int) -> None:
    """madvise(2); a kernel that does not know the advice goes without it."""
    _libc.madvise(address, num_bytes, advice)


def resident_bytes(address: int, num_bytes: int) -> int:
    """How much of a private mapping lies in memory (mincore(2)), in whole pages; 0 if unknown."""
    pages = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
    if _libc.mincore(address, num_bytes, pages):
        return 0
    return int(np.count_nonzero(np.frombuffer(memoryview(pages), np.uint8) & 1)) * mmap.PAGESIZE


def unmap(address: int, num_bytes: int) -> None:
    """Give a range back, whatever is mapped in it."""
    _libc.munmap(address, num_bytes)


def _map(address: int | None, num_bytes: int, protection: int, flags: int, file: int) -> int:
    found = _libc.mmap(address, num_bytes, protection, flags, file, 0)
    if found in (None, _FAILED):
        raise _error("mmap")
    return int(found)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def _load() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [pointer, size]
    libc.mincore.argtypes = [pointer, size, pointer]
    libc.madvise.argtypes = [pointer, size, number]
    libc.mremap.restype = pointer
    libc.mremap.argtypes = [pointer, size, size, number, pointer]
    return libc


_libc = _load()
