"""Answers on their way: whole, or as server-sent events; the client may be slow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .encoding import encode, in_chunks
from .errors import as_api_error

_LOG = logging.getLogger("infc.server")
_DONE = b"data: [DONE]\n\n"

Event = list[bytes]
"""JSON, in pieces."""


class _Patient(Response):
    """Sends a body in chunks, each only after the client has taken those before it."""

    def __init__(self, stall_seconds: float, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._stall_seconds = stall_seconds

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._stall_seconds):
            await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _send_all(self, send: Send, pieces: Iterable[bytes]) -> None:
        """What is long makes room for others between its chunks."""
        for number, chunk in enumerate(in_chunks(pieces)):
            if number:
                await asyncio.sleep(0)
            await self._send(send, chunk)

    def _give_up(self) -> None:
        # Without an end: to the client the answer is cut off, which it is.
        _LOG.warning("a client read nothing for %g s: cut off", self._stall_seconds)


class WholeAnswer(_Patient):
    """An answer that is there already, as JSON in pieces."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes], stall_seconds: float) -> None:
        super().__init__(stall_seconds, {"Content-Length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the head and everything."""
        await self._begin(send)
        try:
            await self._send_all(send, self._pieces)
            await self._send(send, b"", more=False)
        except TimeoutError:
            self._give_up()


class EventStream(_Patient):
    """Sends events one by one.

    The first event must have come already: until then a refusal still has a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: Event, events: AsyncGenerator[Event, None], stall_seconds: float
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stall_seconds, headers)
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the head, every event, and the end."""
        await self._begin(send)
        async with aclosing(self._events) as events:
            try:
                await self._send_event(send, self._first)
                async for event in events:
                    await self._send_event(send, event)
            except TimeoutError:
                self._give_up()
                return
            except Exception as error:
                await self._send_event(send, [encode(as_api_error(error).body)])
            await self._send(send, _DONE, more=False)

    async def _send_event(self, send: Send, event: Event) -> None:
        await self._send_all(send, [b"data: ", *event, b"\n\n"])


async def open_event_stream(
    events: AsyncGenerator[Event, None], stall_seconds: float
) -> EventStream:
    """The response that sends `events`; waits for the first, and raises what it raises."""
    return EventStream(await anext(events), events, stall_seconds)
