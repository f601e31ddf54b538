"""What artifacts need of the file system: swapped names, shared blocks, bytes that stay."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from .errors import UsageError
from .leftovers import partial_prefix

_RENAME_EXCHANGE = 2  # renameat2: swap two names in one step
_AT_FDCWD = -100
_FICLONE = 0x40049409  # ioctl: share the blocks of another file until one is written to


def is_ours(state: os.stat_result) -> bool:
    """Whether nobody but this user, and root, can write to a file or into a directory."""
    return state.st_uid in (0, os.geteuid()) and not state.st_mode & 0o022


def protect(path: Path) -> None:
    """Leaves writing to a file, or into a directory, to its owner alone, whatever the umask says.

    Nothing happens where it belongs to somebody else.
    """
    mode = path.stat().st_mode
    if mode & 0o022:
        with contextlib.suppress(PermissionError):
            path.chmod(mode & 0o7777 & ~0o022)


def exchange(one: Path, other: Path) -> None:
    """Swaps two names in one step, so that no reader ever finds nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        call = (_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
        if libc.renameat2(*call) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    # A file system that cannot swap: between these renames there is nothing, and never a part.
    aside = one.with_name(one.name + "-old")
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)


def share_file(source: Path, destination: Path) -> None:
    """Makes `destination` hold the bytes of `source`: a clone, else a hard link, else a copy."""
    with (
        contextlib.suppress(OSError),
        open(source, "rb") as reader,
        open(destination, "wb") as writer,
    ):
        fcntl.ioctl(writer, _FICLONE, reader.fileno())
        return
    destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, destination)


def sync(path: Path) -> None:
    """Returns once the file's, or the directory's, present state would survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole, or as it was before; OSError where it cannot.

    Text is written as UTF-8.
    """
    partial = path.with_name(f"{partial_prefix(path)}{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def check_writable(directory: Path, what: str, *, hint: str) -> None:
    """UsageError where `directory` is no place to write to; it need not exist, and is not made."""
    place = directory
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot write the {what}: {reason}", where=str(directory), hint=hint
        ) from None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and a termination back until the block is done: for what must not be torn.

    Only the main thread is ever interrupted; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if callable(handler)]
    for number in ours:
        signal.signal(number, lambda which, _: held.append(which))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        if held:
            signal.raise_signal(held[0])


def umask() -> int:
    """The permissions that this process takes from new files."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
