"""Starts the process of an engine, and tells why one ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...ir.errors import InfcError

# As multiprocessing does it: what the front imports, an engine imports from the same place. Until
# then it imports nothing but `sys`, which no file can stand for.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:];"
    " from infc.runtime.replicas.engine_process import main;"
    " main(int(sys.argv[1]), int(sys.argv[2]))"
)
_REFILL_SECONDS = 5.0
_VMSTAT = Path("/proc/vmstat")
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Child:
    """A process, this end of its socket, and how often the kernel had run out of memory then."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    num_killed: int

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self.process.pid

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self.process.kill()


Start = Callable[[], Child]


def start_engine(boot: str = _BOOT) -> Child:
    """A new process that waits for `open`; must be called by a thread that lives as long as it.

    The kernel ends it with the thread that started it. `boot` is for tests, whose engines fail.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            path = [os.path.abspath(place) if place == "" else place for place in sys.path]
            command = [
                sys.executable,
                "-P",  # the current directory is none to import from
                "-c",
                boot,
                str(theirs.fileno()),
                str(os.getpid()),
                *path,
            ]
            with _blocked_signals():
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # the front's is for whoever reads its ready line
                    process_group=0,  # Ctrl-C is for the front, which drains
                )
    except BaseException:
        ours.close()
        raise
    ours.setblocking(False)
    return Child(process, ours, num_killed_for_memory())


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """What this thread starts has them blocked from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """In an engine: the front decides what a signal to all processes means, and drains."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)


class SpareProcess:
    """Keeps one process that has imported everything, so that a successor is there at once.

    A new Python takes most of the time that a new engine needs.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._spare: Child | None = None
        self._is_wanted = self._is_closed = False
        self._filled_at = 0.0

    def take(self) -> Child:
        """The spare process, or a new one. Raises OSError where none can be started."""
        self._is_wanted = False
        self._drop_dead()
        spare, self._spare = self._spare, None
        if spare is not None:
            return replace(spare, num_killed=num_killed_for_memory())
        return self._start()

    def fill(self) -> None:
        """Start a spare process, unless there is one; without it, `take` takes longer."""
        self._is_wanted, self._filled_at = not self._is_closed, time.monotonic()
        self._drop_dead()
        if self._spare is None and self._is_wanted:
            with contextlib.suppress(OSError):
                self._spare = self._start()

    @property
    def is_there(self) -> bool:
        """Whether there is one that has imported everything."""
        self._drop_dead()
        if self._spare is None:
            return False
        try:  # what it says then is left to whoever takes it
            return bool(self._spare.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def refill(self) -> None:
        """Replace a spare process that has died, or could not be started; not too often."""
        if self._is_wanted and time.monotonic() - self._filled_at > _REFILL_SECONDS:
            self.fill()

    def _drop_dead(self) -> None:
        if self._spare is not None and self._spare.process.poll() is not None:
            self._spare.connection.close()
            self._spare = None

    def close(self) -> None:
        """End the spare process."""
        self._is_wanted, self._is_closed = False, True
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.connection.close()
            spare.kill()
            spare.process.wait()


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended, and whether what it was computing may be the reason."""

    error: InfcError
    is_blamed: bool


def death_of(child: Child, *, hung_seconds: float | None = None) -> Death:
    """Of a process that has ended; `hung_seconds` where it was killed for its silence.

    Whoever sends SIGKILL or SIGTERM to an engine says nothing about its requests, unless it is
    the kernel that runs out of memory.
    """
    if hung_seconds is not None:
        return Death(InfcError(f"it said nothing for {hung_seconds:g} s and was killed"), True)
    code = child.process.returncode
    if code is None or code >= 0:
        return Death(InfcError(f"it ended with status {code}"), True)
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL and num_killed_for_memory() > child.num_killed:
        return Death(InfcError("it was killed for lack of memory"), True)
    return Death(InfcError(f"it was ended by {name}"), -code not in _FROM_OUTSIDE)


def num_killed_for_memory() -> int:
    """How many processes of this machine were killed for lack of memory so far."""
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
