"""What killed processes leave beside their work: known by its name, removed once proved abandoned.

A directory that is being filled is `.NAME.infc-partial-*`, and `.NAME.infc-lock` is locked for as
long; a file that is being written is `.NAME.infc-partial-PID`, for the process PID.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

_NAME = re.compile(r"\.(?P<name>.+)\.infc-(?:lock|partial-(?P<rest>\w+))", re.DOTALL)


def lock_path(destination: Path) -> Path:
    """The file that is locked while `destination` is being written."""
    return destination.with_name(f".{destination.name}.infc-lock")


def partial_prefix(destination: Path) -> str:
    """How the names begin under which `destination` is filled, in the directory that holds it."""
    return f".{destination.name}.infc-partial-"


def sweep(directory: Path) -> int:
    """Removes what dead processes left in a directory; the number of things removed.

    What a living one still writes is kept. Nothing is an error: another may sweep too.
    """
    removed = 0
    for name, paths in _found(directory).items():
        if all(path.is_file() and not _is_lock(path) for path in paths):
            removed += sum(_remove_file(path) for path in paths if not _is_alive(path))
            continue
        lock = FileLock(lock_path(directory / name), timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            continue
        try:
            for path in paths:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif not _is_lock(path) and not _is_alive(path):
                    _remove_file(path)
            removed += len(paths)
        finally:
            # While still held: whoever opened it meanwhile sees that it has no name, and retries.
            _remove_file(Path(lock.lock_file))
            lock.release()
    return removed


def _found(directory: Path) -> dict[str, list[Path]]:
    """Locks and partial files and directories by the name of what they are for."""
    found: dict[str, list[Path]] = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if not entry.is_symlink() and (match := _NAME.fullmatch(entry.name)):
                found.setdefault(match["name"], []).append(Path(entry.path))
    return found


def _is_lock(path: Path) -> bool:
    return path.name.endswith(".infc-lock")


def _is_alive(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    if not match or not (match["rest"] or "").isdigit():
        return False
    try:
        os.kill(int(match["rest"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's
    return True


def _remove_file(path: Path) -> int:
    try:
        path.unlink()
    except OSError:
        return 0
    return 1
