"""A directory that is opened once: its files stay the same ones, whatever takes its name later."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_MOST_LEVELS = 16


class OpenDirectory:
    """A directory, and the regular files in it by their names ("code/model.so").

    Names are looked up in the directory that was opened, and never through a link: where another
    directory takes its place, nothing of that one is read. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._handle)

    def open(self, name: str) -> int:
        """A descriptor to read a file with, for the caller to close; OSError for any other kind."""
        *parents, last = name.split("/")
        place = self._handle
        try:
            for parent in parents:
                inner = os.open(parent, _OPEN | os.O_DIRECTORY, dir_fd=place)
                self._leave(place)
                place = inner
            # Without O_NONBLOCK, opening a pipe would wait for a writer.
            handle = os.open(last, _OPEN | os.O_NONBLOCK, dir_fd=place)
        finally:
            self._leave(place)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "not a regular file", str(self.path / name))
        return handle

    def read(self, name: str) -> bytes:
        """What a file holds."""
        with os.fdopen(self.open(name), "rb") as file:
            return file.read()

    def state(self, name: str) -> os.stat_result:
        """What the system knows of a file or a link, which is not followed."""
        return os.stat(name, dir_fd=self._handle, follow_symlinks=False)

    def walk(self) -> Iterator[tuple[str, os.stat_result]]:
        """Everything in it but directories, as (name, state)."""
        for place, inner, names, handle in os.fwalk(".", dir_fd=self._handle, onerror=_raise):
            if place.count("/") > _MOST_LEVELS:
                raise OSError(errno.EINVAL, "directories nest too deeply", str(self.path / place))
            for name in [*inner, *names]:
                state = os.stat(name, dir_fd=handle, follow_symlinks=False)
                if not stat.S_ISDIR(state.st_mode):
                    yield os.path.normpath(os.path.join(place, name)), state

    def _leave(self, handle: int) -> None:
        if handle != self._handle:
            os.close(handle)


def _raise(error: OSError) -> None:
    raise error
