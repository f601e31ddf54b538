"""What a server and its engines write to stderr: text for people, or JSON for machines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from .log_writer import LOG_WRITER

LogFormat = Literal["text", "json"]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that the current task serves."""

_LOGGERS = ("infc.server", "infc.runtime", "uvicorn.error", "asyncio")
_REPEAT_SECONDS = 10.0
_NO_NEWS = (
    # Of every stream that was cut off, of which a warning has said why.
    "ASGI callable returned without completing response.",
    # Of every client that does not speak HTTP, or asks for another protocol: it has its answer.
    "Invalid HTTP request received.",
    "Unsupported upgrade request.",
    "No supported WebSocket library detected.",
)


class ServerLog:
    """Events of a server, as text or as JSON.

    `process` is the id of an engine's own process, which its lines begin with.
    """

    def __init__(self, format: LogFormat = "text", process: int | None = None) -> None:
        self.format = format
        self._process = process

    def event(self, name: str, text: str, *, level: str = "info", **fields: Any) -> None:
        """Write one: `text` for people, `name` and `fields` for machines."""
        if self.format == "json":
            text = encode_event(name, level, text if not fields else None, fields)
        LOG_WRITER.write(printable(text))

    def take_over(self) -> logging.Handler:
        """Let what libraries log come out in this format too; the handler that does it."""
        handler = _Handler(logging.WARNING)
        kind = _JsonRecords if self.format == "json" else _TextRecords
        handler.setFormatter(kind(self._process))
        handler.addFilter(_is_news)
        handler.addFilter(_Seldom())
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


def printable(text: str) -> str:
    """The text in one line that shows what it holds: nobody writes a line of their own."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def announce(text: str) -> None:
    """A line on stdout; that nobody may be there to read it is no reason to stop."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # what is left in its buffer would be tried again at the end
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as error:  # where files have run out, say, a traceback cannot be read
            text = printable(f"{record.levelname.lower()}: {record.msg} (and then {error!r})")
        LOG_WRITER.write(text)


def _is_news(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        return False  # of every request that a second signal ends
    return not record.getMessage().startswith(_NO_NEWS)


class _Seldom(logging.Filter):
    """Lets what asyncio has to say through once in a while: it repeats itself without end."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "asyncio":
            return True
        kind, now = record.getMessage()[:40], time.monotonic()
        if now - self._last.get(kind, -_REPEAT_SECONDS) < _REPEAT_SECONDS or len(self._last) > 256:
            return False
        self._last[kind] = now
        return True


class _Records(logging.Formatter):
    def __init__(self, process: int | None) -> None:
        super().__init__()
        self._process = process


class _JsonRecords(_Records):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"logger": record.name}
        if self._process is not None:
            fields["engine_process"] = self._process
        if (request_id := REQUEST_ID.get()) is not None:
            fields["request_id"] = request_id
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return encode_event("log", record.levelname.lower(), record.getMessage(), fields)


class _TextRecords(_Records):
    def format(self, record: logging.LogRecord) -> str:
        request_id = REQUEST_ID.get()
        place = f" (request {request_id})" if request_id is not None else ""
        engine = f"engine process {self._process}: " if self._process is not None else ""
        text = printable(f"{record.levelname.lower()}: {engine}{record.getMessage()}{place}")
        if not record.exc_info:
            return text
        # Indented, so that no message of an exception looks like a line of the log.
        lines = self.formatException(record.exc_info).splitlines()
        return "\n  ".join([text, *map(printable, lines)])
