"""Server-sent events: chunks as they come, `[DONE]` at the end, and a client that may be slow."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import as_api_error

_LOG = logging.getLogger("infc.server")
_DONE = b"data: [DONE]\n\n"

Event = Mapping[str, Any]


class EventStream(Response):
    """Sends events one by one, each only after the client has taken those before it.

    The first event must have come already: until then a refusal still has a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: Event, events: AsyncGenerator[Event, None], stall_seconds: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the head, every event, and the end."""
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        async with aclosing(self._events) as events:
            try:
                await self._send(send, _encode(self._first))
                async for event in events:
                    await self._send(send, _encode(event))
            except TimeoutError:
                # Without an end: to the client the stream is cut off, which it is.
                _LOG.warning("a client read nothing for %g s: cut off", self._stall_seconds)
                return
            except Exception as error:
                await self._send(send, _encode(as_api_error(error).body))
            await self._send(send, _DONE, more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._stall_seconds):
            await send({"type": "http.response.body", "body": data, "more_body": more})


async def open_event_stream(
    events: AsyncGenerator[Event, None], stall_seconds: float
) -> EventStream:
    """The response that sends `events`; waits for the first, and raises what it raises."""
    return EventStream(await anext(events), events, stall_seconds)


def _encode(event: Event) -> bytes:
    # In ASCII: many clients take U+2028 or U+0085 for the end of a line.
    text = json.dumps(event, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
