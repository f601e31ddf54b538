"""What the server writes to stderr: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that the current task serves."""

_LOGGERS = ("infc.server", "infc.runtime", "uvicorn.error", "asyncio")


class ServerLog:
    """Events of a server, as text or as JSON."""

    def __init__(self, format: LogFormat = "text") -> None:
        self.format = format

    def event(self, name: str, text: str, *, level: str = "info", **fields: Any) -> None:
        """Write one: `text` for people, `name` and `fields` for machines."""
        if self.format == "json":
            text = encode_event(name, level, text if not fields else None, fields)
        print(text, file=sys.stderr, flush=True)

    def take_over(self) -> logging.Handler:
        """Let what libraries log come out in this format too; the handler that does it."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_JsonRecords() if self.format == "json" else _TextRecords())
        handler.addFilter(_is_news)
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.handlers = [handler]
            logger.propagate = False
        return handler


def encode_event(name: str, level: str, message: str | None, fields: dict[str, Any]) -> str:
    """One line of JSON, in ASCII; its time is UTC."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    head = {"time": now, "level": level, "event": name}
    if message is not None:
        head["message"] = message
    return json.dumps({**head, **fields}, separators=(",", ":"), default=str)


def _is_news(record: logging.LogRecord) -> bool:
    """Uvicorn complains of every stream that was cut off, of which a warning has said why."""
    return record.getMessage() != "ASGI callable returned without completing response."


class _JsonRecords(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"logger": record.name}
        if (request_id := REQUEST_ID.get()) is not None:
            fields["request_id"] = request_id
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return encode_event("log", record.levelname.lower(), record.getMessage(), fields)


class _TextRecords(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request_id = REQUEST_ID.get()
        place = f" (request {request_id})" if request_id is not None else ""
        text = f"{record.levelname.lower()}: {record.getMessage()}{place}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text
