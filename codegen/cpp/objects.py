"""Object files of kernels, compiled once for a target and linked with the step of any model.

They lie in the user's cache, under a digest of all that they are made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...ir.files import is_ours, write_whole
from ...ir.user_cache import cache_directory, make_private

MOST_BYTES: Final = 256 * 10**6
"""How much is kept; what was not used for longest goes first."""

_DIGEST_BYTES: Final = hashlib.sha256().digest_size


def kept_objects() -> ObjectStore:
    """The user's store."""
    return ObjectStore(cache_directory() / "kernels")


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Object files by key. Whatever goes wrong in it costs a compilation and nothing else."""

    directory: Path
    most_bytes: int = MOST_BYTES

    def find(self, key: str) -> bytes | None:
        """The object of that key; None if there is none, it is damaged, or others can write it."""
        path = self.directory / key
        try:
            if not is_ours(self.directory.stat()):
                return None
            with open(path, "rb") as file:
                if not is_ours(os.fstat(file.fileno())):
                    return None
                digest, data = file.read(_DIGEST_BYTES), file.read()
            if hashlib.sha256(data).digest() != digest:
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):  # one that is only read from works as well
            os.utime(path)  # the time of the last use
        return data

    def keep(self, key: str, data: bytes) -> None:
        """Keep an object for later compilations, of this process and of others."""
        with contextlib.suppress(OSError):
            make_private(self.directory)
            write_whole(self.directory / key, hashlib.sha256(data).digest() + data)
            self._evict(spared=key)

    def _evict(self, spared: str) -> None:
        found = []
        for path in self.directory.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it
                if path.name[0] != "." and path.is_file():
                    found.append((path, path.stat()))
        left = sum(state.st_size for _, state in found)
        for path, state in sorted(found, key=lambda one: one[1].st_mtime):
            if left <= self.most_bytes:
                break
            if path.name != spared:
                path.unlink(missing_ok=True)
                left -= state.st_size


def object_key(command: Iterable[str], compiler: str, texts: Iterable[tuple[str, bytes]]) -> str:
    """The key of what a command makes of texts, given by their names, with this compiler."""
    digest = hashlib.sha256(repr((list(command), compiler)).encode())
    for name, text in texts:
        digest.update(hashlib.sha256(name.encode() + b"\0" + text).digest())
    return digest.hexdigest()
