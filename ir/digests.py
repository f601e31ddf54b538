"""SHA-256 of files and their chunks, computed in parallel, and stamps that spare the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .directory import OpenDirectory
from .errors import ArtifactError
from .machine import available_cpus
from .manifest import FileDigest
from .user_cache import read_private, write_private

CHUNK_BYTES = 16 << 20
"""A larger file is digested in chunks of this many bytes, each on whatever thread is free."""

_READ_BYTES = 1 << 20  # small enough to stay in a core's own cache between the copy and the hash
_SETTLED_NS = 50_000_000  # a file changed this recently may change again under the same time stamp

_Job = tuple[str, int, int, str]
"""A file, where a chunk of it starts, how many bytes it has, and its expected digest."""


def digest_file(path: Path) -> FileDigest:
    """The size and digest, or digests, of one file."""
    with open(path, "rb", buffering=0) as file:
        handle = file.fileno()
        size = os.fstat(handle).st_size
        if size <= CHUNK_BYTES:
            return FileDigest(bytes=size, sha256=_sha256(handle, 0, size))
        starts = range(0, size, CHUNK_BYTES)

        def digest(at: int) -> str:
            return _sha256(handle, at, min(CHUNK_BYTES, size - at))

        with ThreadPoolExecutor(_num_threads()) as pool:
            chunks = tuple(pool.map(digest, starts))
    return FileDigest(bytes=size, chunk_bytes=CHUNK_BYTES, chunks=chunks)


def check_digests(directory: OpenDirectory, files: Mapping[str, FileDigest]) -> None:
    """Reads each of these files whole; raises ArtifactError naming the first that differs."""
    root = directory.path
    jobs = [job for name, digest in files.items() for job in _jobs(root, name, digest)]
    stop = threading.Event()

    def check(job: _Job) -> None:
        name, start, length, expected = job
        path = root / name
        if stop.is_set():
            return
        try:
            handle = directory.open(name)
            try:
                actual = _sha256(handle, start, length)
            finally:
                os.close(handle)
        except OSError as error:
            stop.set()
            raise ArtifactError(f"cannot be read: {error.strerror}", where=str(path)) from None
        if actual != expected:
            stop.set()
            whole = length == files[name].bytes
            part = f"{length} bytes" if whole else f"bytes {start} to {start + length - 1}"
            raise ArtifactError(
                f"its {part} do not match their digest",
                where=str(path),
                hint="the artifact is damaged: compile it again",
            )

    with ThreadPoolExecutor(_num_threads(), thread_name_prefix="infc-digest") as pool:
        try:
            for _ in pool.map(check, jobs):
                pass
        finally:
            stop.set()  # on Ctrl-C too: what has not begun is not worth waiting for


def _jobs(root: Path, name: str, digest: FileDigest) -> Iterable[_Job]:
    if digest.sha256 is not None and digest.chunks is None:
        return [(name, 0, digest.bytes, digest.sha256)]
    step, chunks = digest.chunk_bytes, digest.chunks
    if not step or step < 0 or not chunks or -(-digest.bytes // step) != len(chunks):
        raise ArtifactError(f"the digests of {name!r} do not cover it", where=str(root))
    return [
        (name, at, min(step, digest.bytes - at), chunk)
        for at, chunk in zip(range(0, digest.bytes, step), chunks, strict=True)
    ]


def _sha256(handle: int, start: int, length: int) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(min(_READ_BYTES, max(length, 1)))
    view = memoryview(buffer)
    while length > 0:
        # Read, not mapped: a file cut short meanwhile is then an error, not a signal.
        count = os.preadv(handle, [view[: min(len(buffer), length)]], start)
        if count == 0:
            break
        digest.update(view[:count])
        start, length = start + count, length - count
    return digest.hexdigest()


def _num_threads() -> int:
    return min(16, available_cpus())


class StampFile:
    """Remembers, outside the artifact, which of its files were found right, by their stamps.

    A stamp is device, inode, size and both times of change; one that still holds spares reading
    the file again. A lost or unwritable stamp file only costs that reading.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity  # the digest of the manifest's text
        self._lock = threading.Lock()
        self._stamps = self._load()

    def is_fresh(self, directory: OpenDirectory, name: str) -> bool:
        """Whether the file was checked before and has not changed since."""
        known = self._stamps.get(name)
        return known is not None and known == _stamp(directory, name)

    def watch(self, directory: OpenDirectory, names: Iterable[str]) -> Callable[[], None]:
        """Takes the stamps of files about to be read; call the result once they proved right."""
        now_ns = time.time_ns()
        before = {name: _stamp(directory, name) for name in names}
        settled = {k: v for k, v in before.items() if max(v[3:]) < now_ns - _SETTLED_NS}

        def keep() -> None:
            with self._lock:
                self._stamps.update(settled)
                self._store()

        return keep

    def _load(self) -> dict[str, tuple[int, ...]]:
        try:
            data = json.loads(read_private(self._path))
            if data["manifest"] != self._identity:
                return {}
            return {str(k): tuple(map(int, v)) for k, v in data["stamps"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _store(self) -> None:
        with contextlib.suppress(OSError):
            text = json.dumps({"manifest": self._identity, "stamps": self._stamps})
            write_private(self._path, text)


def _stamp(directory: OpenDirectory, name: str) -> tuple[int, ...]:
    """Device, inode, size, time of the last change of content, and of content or attributes."""
    state = directory.state(name)
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
