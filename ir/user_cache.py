"""The user's cache directory: closed to everybody else, and nothing of others is believed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import platformdirs

from .files import is_ours, write_whole


def cache_directory() -> Path:
    """Where the cache lies: `$XDG_CACHE_HOME/infc`, or its usual place."""
    return platformdirs.user_cache_path("infc")


def make_private(directory: Path) -> None:
    """Makes a directory of the cache, and those around it, for this user alone.

    One that others may look into is closed to them. OSError where it is another user's, or cannot
    be made.
    """
    top = cache_directory()
    inner = directory.relative_to(top).parts if directory.is_relative_to(top) else ()
    place = directory if not inner else top
    for name in ("", *inner):
        place = place / name
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = place.stat()
        if state.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "belongs to another user", str(place))
        if state.st_mode & 0o077:
            place.chmod(0o700)


def read_private(path: Path) -> str:
    """The text of a file; OSError where it cannot be read, or others can write to it."""
    with open(path, encoding="utf-8") as file:
        if not is_ours(os.fstat(file.fileno())):
            raise PermissionError(errno.EPERM, "can be written to by other users", str(path))
        return file.read()


def write_private(path: Path, text: str) -> None:
    """Writes a file of the cache whole; OSError where it cannot."""
    make_private(path.parent)
    write_whole(path, text)


def refusal(directory: Path) -> str | None:
    """Why a directory of the cache and what is in it are not used: others can write there."""
    try:
        for place in (directory, *directory.rglob("*")):
            if not is_ours(place.lstat()):
                return f"{place} belongs to another user, or others can write to it"
    except OSError as error:
        return f"{directory} cannot be read: {error.strerror}"
    return None
