"""A line on stderr for each request that ended: what it was, its status, tokens and time."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .usage import Usage

_MAX_PATH = 200  # characters


@dataclass(slots=True)
class RequestRecord:
    """What a route tells of a request that it serves."""

    answer_id: str = "-"
    usage: Usage | None = None


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request; one that nobody reads where requests are not logged."""
    record = scope.get("infc.record")
    return record if isinstance(record, RequestRecord) else RequestRecord()


class RequestLog:
    """Middleware: `METHOD PATH STATUS ID PROMPT+ANSWER tokens SECONDS s`, once the answer ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        record = scope["infc.record"] = RequestRecord()
        status, whole = "-", False

        async def watched(message: Message) -> None:
            nonlocal status, whole
            await send(message)
            if message["type"] == "http.response.start":
                status = str(message["status"])
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status, whole = "500", True  # answered by what stands around this
            raise
        finally:
            # Percent-encoded, so nobody writes a line of their own.
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:_MAX_PATH]
            used = record.usage.as_json() if record.usage is not None else {}
            tokens = f"{used.get('prompt_tokens', 0)}+{used.get('completion_tokens', 0)} tokens"
            spent = f"{time.monotonic() - begun:.2f} s" + ("" if whole else ", cut off")
            line = f"{scope['method']} {path} {status} {record.answer_id} {tokens} {spent}"
            print(line, file=sys.stderr, flush=True)
