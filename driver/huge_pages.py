"""Whether the kernel gives huge pages where it is asked: measured, as settings do not tell."""

from __future__ import annotations

import contextlib
import mmap
import re
import tempfile
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_BYTES = 8 << 20  # some huge pages, wherever in it the first one begins
_HUGE = re.compile(r"^(?:AnonHugePages|ShmemPmdMapped|FilePmdMapped): +(\d+) kB$", re.M)


def anonymous_in_huge_pages() -> bool:
    """Whether memory that was asked for in huge pages comes in them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, _BYTES, flags=flags) as memory:
        if not _ask(memory):
            return False
        memory[:: mmap.PAGESIZE] = b"\1" * (_BYTES // mmap.PAGESIZE)
        return _huge_bytes(_address(memory)) > 0


def file_in_huge_pages(directory: Path) -> bool:
    """Whether a file in `directory` is mapped in huge pages; OSError where none can be written."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".infc-doctor-") as file:
        file.write(b"\1" * _BYTES)
        file.flush()
        # Private and writable only so that its address can be taken; nothing is written.
        with mmap.mmap(file.fileno(), _BYTES, flags=mmap.MAP_PRIVATE) as memory:
            if not _ask(memory):
                return False
            memory[:: mmap.PAGESIZE]
            return _huge_bytes(_address(memory)) > 0


def _ask(memory: mmap.mmap) -> bool:
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
        return True
    return False


def _address(memory: mmap.mmap) -> int:
    import ctypes

    anchor = ctypes.c_char.from_buffer(memory)
    try:
        return ctypes.addressof(anchor)
    finally:
        del anchor  # a mapping with a view on it cannot be closed


def _huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds `address`."""
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", _SMAPS.read_text(), flags=re.M):
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", part)
        if head and int(head[1], 16) <= address < int(head[2], 16):
            return sum(int(size) << 10 for size in _HUGE.findall(part))
    return 0
