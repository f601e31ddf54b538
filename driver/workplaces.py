"""Directories and locks for compilations: one at a time for each cache key, or temporary."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..ir.errors import UsageError
from ..ir.leftovers import lock_path, partial_prefix
from ..ir.user_cache import make_private

WORKPLACES = ("compiling", "temporary")
"""Directories in the cache for locks, and for artifacts that only one process uses."""


@contextlib.contextmanager
def one_at_a_time(cache: Path, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a cache key; other processes that compile the same key wait for it.

    `on_wait` is called before waiting. Raises UsageError if the cache cannot be written.
    """
    path = lock_path(cache / "compiling" / key)
    with contextlib.ExitStack() as stack:
        with _explained(cache):
            make_private(path.parent)
            lock = FileLock(path, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                on_wait()
                lock.acquire(timeout=-1)
            stack.callback(_unlock, lock)
        yield


def temporary_output(cache: Path) -> Path:
    """The path of a temporary artifact, which is removed when the process ends.

    Raises UsageError if the cache cannot be written.
    """
    name = cache / "temporary" / uuid.uuid4().hex
    with _explained(cache):
        make_private(name.parent)
        # Named and locked like a partial artifact: if this process is killed, another removes it.
        lock = FileLock(lock_path(name))
        lock.acquire()
        made = Path(tempfile.mkdtemp(prefix=partial_prefix(name), dir=name.parent))
    atexit.register(_unlock, lock)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made / "model.infc"


@contextlib.contextmanager
def _explained(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the cache cannot be written: {error.strerror or error}",
            where=str(cache),
            hint="compile with `infc compile MODEL -o DIR`, or set $XDG_CACHE_HOME",
        ) from None


def _unlock(lock: FileLock) -> None:
    # Removed while still held: a process that has just opened it notices, and tries again.
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
