"""Weights on the device: read in chunks by threads, and copied while the next are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from ....ir.artifact import Artifact
from ....ir.errors import ArtifactError
from ....ir.machine import available_cpus
from ....ir.manifest import CompiledProgram
from ....ir.safetensors import Entry, read_header
from .driver import Bytes, Driver

CHUNK_BYTES: Final = 8 << 20
_ALIGNMENT: Final = 256
_MOST_READERS: Final = 4
_GAP: Final = 4096
"""Bytes between two tensors of a file that are rather copied too than skipped."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of a file that stay together, and where they go."""

    handle: int
    name: str
    begin: int
    num_bytes: int
    offset: int


class DeviceWeights:
    """The tensors of a program in one piece of the device's memory.

    With `aligned`, each begins at a multiple of 256 bytes, whatever its place in the file.
    """

    def __init__(
        self, artifact: Artifact, program: CompiledProgram, *, aligned: bool = False
    ) -> None:
        self._aligned = aligned
        self.entries: dict[str, Entry] = {}
        self.num_bytes = 0
        self._artifact = artifact
        self._offsets: dict[str, int] = {}
        self._base: int | None = None
        shared = set(program.weights.shared)
        own = [name for name in program.weights.tensors if name not in shared]
        with ExitStack() as stack:
            self._runs = [
                *self._plan(program.weights.file, own, stack),
                *self._plan(artifact.manifest.main.weights.file, sorted(shared), stack),
            ]
            self._files = stack.pop_all()

    def _plan(self, file: str, names: Iterable[str], stack: ExitStack) -> Iterator[_Run]:
        """Where the tensors of a file go: neighbours stay neighbours."""
        wanted = list(names)
        if not wanted:
            return
        path = self._artifact.path / file
        handle = self._artifact.open_file(file)
        stack.callback(os.close, handle)
        entries, _, start = read_header(path, handle)
        for name in wanted:
            if name not in entries:
                raise ArtifactError("is not in the file", where=f"{path}: {name}")
        found = sorted((entries[name] for name in wanted), key=lambda entry: entry.begin)
        first = 0
        for place, entry in enumerate(found):
            after = found[place + 1] if place + 1 < len(found) else None
            if after is not None and after.begin - entry.end <= _GAP and not self._aligned:
                continue
            run = found[first : place + 1]
            begin = run[0].begin
            # The distance to the alignment stays, as tensors were aligned within the file.
            at = -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT
            at += 0 if self._aligned else begin % _ALIGNMENT
            for one in run:
                self.entries[one.name] = one
                self._offsets[one.name] = at + one.begin - begin
            self.num_bytes = at + entry.end - begin
            yield _Run(handle, str(path), start + begin, entry.end - begin, at)
            first = place + 1

    def upload(self, driver: Driver) -> None:
        """Copy all to the device. ArtifactError where the file has become shorter."""
        self._base = driver.allocate(max(1, self.num_bytes), "the weights")
        chunks = [
            (run, at, min(CHUNK_BYTES, run.num_bytes - at))
            for run in self._runs
            for at in range(0, run.num_bytes, CHUNK_BYTES)
        ]
        if not chunks:
            return
        readers = min(_MOST_READERS, max(1, available_cpus()), len(chunks))
        most = max(size for _, _, size in chunks)
        buffers = [driver.host_array(most) for _ in range(min(len(chunks), readers + 1))]
        events: list[object | None] = [None] * len(buffers)
        reading: dict[int, Future[None]] = {}
        with ThreadPoolExecutor(readers, thread_name_prefix="infc-weights") as pool:
            try:
                for place, (run, at, size) in enumerate(chunks):
                    ahead = range(place, min(len(chunks), place + len(buffers)))
                    for later in (one for one in ahead if one not in reading):
                        turn = later % len(buffers)
                        if (event := events[turn]) is not None:
                            driver.wait(event)
                        next_run, next_at, next_size = chunks[later]
                        reading[later] = pool.submit(
                            _read, next_run, next_at, buffers[turn][:next_size]
                        )
                    reading.pop(place).result()
                    turn = place % len(buffers)
                    driver.upload(self._base + run.offset + at, buffers[turn][:size])
                    events[turn] = driver.record_event()
            finally:
                for future in reading.values():
                    future.cancel()
        for buffer in buffers:
            driver.free_host_array(buffer)
        self.close()

    def address(self, name: str) -> int | None:
        """Where a tensor lies once it was copied; None where there is none."""
        offset = self._offsets.get(name)
        return None if offset is None or self._base is None else self._base + offset

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _read(run: _Run, at: int, target: Bytes) -> None:
    """Fill `target` with bytes of a run from `at` on."""
    view, done = target.data, 0
    while done < len(view):
        count = os.preadv(run.handle, [view[done:]], run.begin + at + done)
        if count == 0:
            raise ArtifactError("was truncated", where=run.name)
        done += count
