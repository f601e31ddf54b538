"""Connections: how many there may be, and how long one may take to say what it wants."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, ClassVar, Final, Literal

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .settings import ServerSettings

MOST_REFUSED = 64
"""Connections above the limit that may be told so at a time; one more, and the oldest is closed."""

# Of one read: what it may hold is handled before others have their turn.
_READ_BYTES = 1 << 12
_READ_BYTES_OF_BODY = 1 << 16  # of a body that comes in one piece
_REFUSED_SECONDS = 1.0  # for the request that a refusal is the answer to
_REST_SECONDS = 5.0  # for the rest of a body that nobody wants
_MANY_CHUNKS = 512
_LEAST_CHUNK = 16  # bytes, on average, once they are many
_MAX_HEADERS = 128
_HEAD_END = re.compile(rb"\n\r?\n")  # as h11 has it
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: chunked\r\n", re.IGNORECASE)

WRITE_AT_ONCE: Final = "infc.write_at_once"
"""In the scope of a request: `_BoundedProtocol.write_at_once`."""

_Wait = Literal["head", "rest"]


def bounded_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP, under `max_connections` and `header_seconds`."""

    class Protocol(_BoundedProtocol):
        limits = settings
        refused: ClassVar[dict[_BoundedProtocol, None]] = {}

    return Protocol


class _Connection(h11.Connection):
    """H11 under more rules: which requests are the last, how many headers, and how many chunks."""

    is_last = False
    is_chunked = False
    refusal: str | None = None
    _num_chunks = _num_bytes = 0
    _sends_chunks = False

    def chunk(self, data: bytes) -> bytes | None:
        """A part of a body that is sent in chunks, as `send` has it; None for any other.

        It changes nothing of the state that h11 looks after, which takes several times as long.
        """
        if not self._sends_chunks or self.our_state is not h11.SEND_BODY:
            return None
        return b"%x\r\n%b\r\n" % (len(data), data) if data else b""

    def send(self, event: Any) -> Any:
        """As h11 has it."""
        if type(event) is h11.Data and (chunk := self.chunk(event.data)) is not None:
            return chunk
        output = super().send(event)
        if type(event) is h11.Response:
            self._sends_chunks = _CHUNKED.search(output) is not None
        return output

    def next_event(self) -> Any:
        """As h11 has it."""
        if self.their_state is h11.IDLE:
            # Before it parses them: thousands of short lines fit in a head that is not too long.
            data = self.trailing_data[0]
            end = _HEAD_END.search(data)
            # The first line is the request's own; what comes after the head is not looked at.
            if data.count(b"\n", 0, end.start() if end else len(data)) > _MAX_HEADERS + (not end):
                self.refusal = f"The request has more than {_MAX_HEADERS} headers."
                raise h11.RemoteProtocolError(self.refusal)
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
            names = {bytes(name) for name, _ in event.headers}
            self.is_chunked = b"transfer-encoding" in names
            # Two lengths: whoever stands between may have believed the other one (RFC 9112, 6.1).
            if self.is_last or (self.is_chunked and b"content-length" in names):
                return h11.Request(
                    method=event.method,
                    target=event.target,
                    headers=[*event.headers, (b"connection", b"close")],
                    http_version=event.http_version,
                )
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            if self._num_chunks > _MANY_CHUNKS + self._num_bytes // _LEAST_CHUNK:
                self.refusal = "The body comes in too many small chunks."
                raise h11.RemoteProtocolError(self.refusal)
        return event


class _BoundedProtocol(H11Protocol):
    """Uvicorn waits for a first request, and for the rest of a body, for as long as it takes."""

    limits: ServerSettings
    refused: ClassVar[dict[_BoundedProtocol, None]]  # by age
    conn: _Connection

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Connection(h11.SERVER, self.limits.max_header_bytes)
        self.app = self._offering(self.app)
        self._waiting: _Wait | None = None
        self._timer: asyncio.TimerHandle | None = None

    def _offering(self, app: Any) -> Any:
        """The app, which finds `write_at_once` in its scope."""

        def run(scope: Scope, receive: Receive, send: Send) -> Any:
            scope[WRITE_AT_ONCE] = self.write_at_once
            return app(scope, receive, send)

        return run

    def write_at_once(self, data: bytes) -> bool:
        """Send a part of the body of a response that has begun, unless that has to wait.

        Whether it was sent; where not, `send` of the application does it.
        """
        if self.flow.write_paused or self.transport.is_closing():
            return False
        chunk = self.conn.chunk(data)
        if chunk is not None:
            self.transport.write(chunk)
        return chunk is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_at_most(_READ_BYTES)
        if len(self.connections) - len(self.refused) <= self.limits.max_connections:
            self._wait("head", self.limits.header_seconds)
            return
        self.app = _refusing(self.app)
        self.conn.is_last = True
        self._wait("head", _REFUSED_SECONDS)
        # The newest is kept: it may be about to ask how the server is.
        self.refused[self] = None
        if len(self.refused) > MOST_REFUSED:
            oldest = next(iter(self.refused))
            del self.refused[oldest]
            self.connections.discard(oldest)  # it counts no more
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            if self._waiting != "head":  # a part of a later head: its clock starts here
                self._wait("head", self.limits.header_seconds)
        elif self._waiting == "head" or self.conn.their_state is not h11.SEND_BODY:
            self._stop_waiting()
        whole = self.conn.their_state is h11.SEND_BODY and not self.conn.is_chunked
        self._read_at_most(_READ_BYTES_OF_BODY if whole else _READ_BYTES)
        self._await_rest()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.refused.pop(self, None)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is told so in the shape of all errors, and the connection ends."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of an answer: nothing can be said any more
            return
        error = ApiError(400, self.conn.refusal or msg, code="invalid_http")
        body = json.dumps(error.body).encode()
        headers = [("content-type", "application/json"), ("connection", "close")]
        headers.append(("content-length", str(len(body))))
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _read_at_most(self, num_bytes: int) -> None:
        self.transport.max_size = num_bytes  # type: ignore[attr-defined] # asyncio's own bound

    def _await_rest(self) -> None:
        """A client that has its answer may still send the body, which is not kept."""
        answered = self.cycle is not None and self.cycle.response_complete
        if not answered or self.conn.their_state is not h11.SEND_BODY:
            return
        if (b"expect", b"100-continue") in self.headers:
            self.transport.close()  # whether the body comes now, nobody can tell
        elif self._waiting != "rest":
            self._wait("rest", min(_REST_SECONDS, self.limits.body_seconds))

    def _wait(self, what: _Wait, seconds: float) -> None:
        self._stop_waiting()
        self._waiting = what
        self._timer = self.loop.call_later(seconds, self._give_up)

    def _stop_waiting(self) -> None:
        self._waiting = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self.transport.abort()


def _refusing(app: Any) -> Any:
    """The app for who is one too many; whoever watches over the server may still ask."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            await app(scope, receive, send)
            return
        error = ApiError(
            503, "too many connections are open", code="too_many_connections", retry_seconds=1
        )
        await error.response()(scope, receive, send)

    return refuse
