"""Memory of an executor's own: zeroed, committed as it is touched, in huge pages where allowed."""

from __future__ import annotations

import contextlib
import mmap

from ...ir.errors import CapacityError


def reserve(num_bytes: int) -> mmap.mmap:
    """Zeroed memory, page-aligned, committed as it is touched; huge pages where allowed."""
    try:
        # Private: shared memory gets no huge pages on most kernels, and a fork would write to it.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=flags)
    except OSError as error:
        raise CapacityError(
            f"cannot reserve {num_bytes / 2**20:.0f} MiB: {error}",
            hint="lower kv_cache.memory, runtime.max_context or runtime.max_sequences",
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without transparent huge pages refuses: slower, and nothing else.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
