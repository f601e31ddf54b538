"""The server process: the event loop, the ready line, and the two ways it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ...ir.errors import UsageError
from ...ir.sizes import format_count
from ..log import ServerLog, announce
from .connections import MOST_REFUSED, bounded_protocol
from .event_loop import SturdyEventLoop
from .hangups import Hangups, is_heard
from .interpreter import short_waits
from .served import Drainable
from .settings import ServerSettings

_POLL_SECONDS = 0.05
_FLUSH_SECONDS = 5.0
_OWN_FILES = 32  # that may still be opened: libraries, pipes
_MAX_BACKLOG = 4096
_ACCEPT_AT_ONCE = 16  # connections of one turn of the event loop
_UNCOUNTED = 6 * _ACCEPT_AT_ONCE  # accepted, and not yet counted or closed
_LAST_WORDS_SECONDS = 1.0  # for the event that tells a client that its stream was cut off


def run_server(
    app: ASGIApp,
    listener: socket.socket,
    engine: Drainable,
    settings: ServerSettings,
    *,
    replace: Callable[[], None] | None = None,
    hangups: Hangups | None = None,
) -> bool:
    """Serves until a signal; True where that was SIGINT.

    The first SIGTERM or SIGINT stops accepting and waits `drain_seconds` for running answers;
    the second ends everything at once. `replace` is called on the event loop for a SIGHUP, which
    is as SIGTERM without it, and where it says that the terminal is gone. `hangups` has heard what
    came before.
    """
    settings = _within_files(settings)
    config = server_config(app, settings)
    server = _Server(config, listener, engine, settings, replace, hangups or Hangups())
    with short_waits():
        server.run(sockets=[listener])
    return server.interrupted


def server_config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """What uvicorn is told."""
    return uvicorn.Config(
        app,
        # H11 is what loads quickly and bounds what it reads.
        http=bounded_protocol(settings),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
        backlog=_ACCEPT_AT_ONCE,  # asyncio takes it for both; how many may queue is set later
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )


def _within_files(settings: ServerSettings) -> ServerSettings:
    """Raises the limit of open files as far as is needed and allowed; fewer connections else.

    Raises UsageError where not even a few would be left.
    """
    others = _num_open() + _OWN_FILES + MOST_REFUSED + _UNCOUNTED
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + others
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    if soft - others < 1:
        raise UsageError(
            f"the limit of {soft} open files is too low to serve",
            hint=f"raise it to at least {others + 16}: ulimit -n {others + 16}",
        )
    ServerLog(settings.log_format).event(
        "note",
        f"note: {soft - others} connections at most: this process may have {soft} files open",
        max_connections=soft - others,
        max_open_files=soft,
    )
    return replace(settings, max_connections=soft - others)


def _num_open() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 64


class _Server(uvicorn.Server):
    """Uvicorn, which waits for ever and for a second SIGINT only, with a drain of our own."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        engine: Drainable,
        settings: ServerSettings,
        replace: Callable[[], None] | None,
        hangups: Hangups,
    ) -> None:
        super().__init__(config)
        self.interrupted = False
        self._replace = replace
        self._hangups = hangups
        self._listener = listener
        self._closing: dict[Any, float] = {}
        self._engine = engine
        self._settings = settings
        self._log = ServerLog(settings.log_format)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end, on a loop that outlives moments without memory."""
        with asyncio.Runner(loop_factory=SturdyEventLoop) as runner:
            runner.run(self.serve(sockets=sockets))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal. Not remembered as uvicorn does, which would die of it at last."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self.interrupted = self.interrupted or sig == signal.SIGINT

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """Called by SIGHUP: somebody asks for another artifact, or has closed the terminal."""
        if self._replace is None or not self._hangups.ask():
            self.handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Also SIGHUP, unless nohup or a service manager has it ignored."""
        if not is_heard():
            with super().capture_signals():
                yield
            return
        before = signal.signal(signal.SIGHUP, self.handle_hangup)
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(signal.SIGHUP, before)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        await super().startup(sockets)
        with contextlib.suppress(OSError):  # the listener of a test may be another's
            self._listener.listen(min(self._settings.max_connections, _MAX_BACKLOG))
        host, port = self._listener.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        announce(f"serving {', '.join(self._settings.model_names)} at http://{place}/v1")

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self._abort_stalled()
        if self._replace is not None and self._hangups.take() and not self.should_exit:
            self._replace()
        return await super().on_tick(counter)

    def _abort_stalled(self) -> None:
        """Gives up connections that are closed here, and whose client does not read the rest."""
        now = asyncio.get_running_loop().time()
        patience = min(_FLUSH_SECONDS, self._settings.stall_seconds)
        closing = [c for c in self.server_state.connections if c.transport.is_closing()]
        self._closing = {c: self._closing.get(c, now) for c in closing}
        for connection, since in self._closing.items():
            if now - since > patience:
                connection.transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets running answers end, for `drain_seconds` and while nobody asks again."""
        count, seconds = self._engine.num_pending, self._settings.drain_seconds
        wait = f", {format_count(count, 'answer')} to finish within {seconds:g} s" if count else ""
        self._log.event("stopping", f"stopping{wait}", pending=count, drain_seconds=seconds)
        drain = asyncio.create_task(super().shutdown(sockets))
        if not await self._wait(drain, self._settings.drain_seconds):
            # Fails whatever is pending, so that each client hears why its answer ends here.
            await asyncio.to_thread(self._engine.shutdown, _LAST_WORDS_SECONDS)
            await self._wait(drain, _LAST_WORDS_SECONDS)
        if not drain.done():
            for task in list(self.server_state.tasks):
                task.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            self.force_exit = True
        await drain

    async def _wait(self, drain: asyncio.Task[None], seconds: float) -> bool:
        """Whether the drain ended in time; not waited for once the exit is forced."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not drain.done() and not self.force_exit:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            self._abort_stalled()
            await asyncio.wait({drain}, timeout=min(_POLL_SECONDS, left))
        return drain.done()
