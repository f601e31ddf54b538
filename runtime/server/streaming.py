"""Answers on their way: whole, or as server-sent events; the client may be slow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .connections import WRITE_AT_ONCE
from .encoding import encode, in_chunks
from .errors import as_api_error
from .events import framed

if TYPE_CHECKING:
    from .events import Events

_LOG = logging.getLogger("infc.server")
_DONE = b"data: [DONE]\n\n"


class _Patient(Response):
    """Sends a body in chunks, each only after the client has taken those before it."""

    def __init__(self, stall_seconds: float, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._stall_seconds = stall_seconds
        self._since: float | None = None  # when the chunk was given that has not been taken
        self._clock: Callable[[], float] = asyncio.get_running_loop().time

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Within, a client that takes nothing for `stall_seconds` is given up.

        One clock for all chunks: setting one for each takes longer than sending it.
        """
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            until = (self._since or loop.time()) + self._stall_seconds
            if loop.time() >= until:
                limit.reschedule(until)
            else:
                timer = loop.call_at(until, look)

        try:
            async with asyncio.timeout(None) as limit:
                look()
                yield
        except TimeoutError:
            # Without an end: to the client the answer is cut off, which it is.
            _LOG.warning("a client read nothing for %g s: cut off", self._stall_seconds)
        finally:
            if timer is not None:
                timer.cancel()

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        self._since = self._clock()
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._since = None

    async def _send_all(self, send: Send, pieces: Sequence[bytes]) -> None:
        """What is long makes room for others between its chunks."""
        for number, chunk in enumerate(in_chunks(pieces)):
            if number:
                await asyncio.sleep(0)
            await self._send(send, chunk)


class WholeAnswer(_Patient):
    """An answer that is there already, as JSON in pieces."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes], stall_seconds: float) -> None:
        super().__init__(stall_seconds, {"Content-Length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the head and everything."""
        await self._begin(send)
        async with self._patience():
            await self._send_all(send, self._pieces)
            await self._send(send, b"", more=False)


class EventStream(_Patient):
    """Sends events as they come.

    The first must have come already: until then a refusal still has a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, first: list[bytes], events: Events, stall_seconds: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stall_seconds, headers)
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the head, every event, and the end."""
        try:
            await self._begin(send)
            async with self._patience():
                await self._send_events(send, scope.get(WRITE_AT_ONCE))
        finally:
            self._events.close()

    async def _send_events(self, send: Send, write: Callable[[bytes], bool] | None) -> None:
        try:
            await self._send_all(send, self._first)
            if write is not None:
                self._events.write_at_once(write)
            while pieces := await self._events.get():
                await self._send_all(send, pieces)
        except Exception as error:
            await self._send_all(send, framed([encode(as_api_error(error).body)]))
        await self._send(send, _DONE, more=False)


async def open_event_stream(events: Events, stall_seconds: float) -> EventStream:
    """The response that sends `events`; waits for the first, and raises what that raises."""
    try:
        return EventStream(await events.get(), events, stall_seconds)
    except BaseException:
        events.close()
        raise
