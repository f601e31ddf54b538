"""From the bytes of a request to its wire type: bounded, strict, each refusal naming its field."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from ...ir.freed_memory import release_memory
from ...ir.nearest import did_you_mean
from .errors import ApiError
from .json_body import SMALL_BYTES, parse_json
from .protocol import IGNORED, ChatMessage, GenerationRequest, StreamOptions, TextPart
from .settings import ServerSettings
from .workers import Workers

_BODIES_AT_ONCE = 32  # of the greatest length
_MUCH_BYTES = 16 << 20  # of bodies, after which the memory that they took is given back
_Request = TypeVar("_Request", bound=GenerationRequest)


class BodyReader:
    """Reads bodies, a long one beside the event loop; bounds what all of them take together."""

    def __init__(self, settings: ServerSettings, workers: Workers, max_context: int) -> None:
        self._settings = settings
        self._workers = workers
        # More ids than this could not be served, however they are spread over prompts.
        self._max_integers = {"prompt": settings.max_prompts * max_context}
        self._room = self._all_room = _BODIES_AT_ONCE * settings.max_body_bytes
        self._freed = 0

    @asynccontextmanager
    async def read(self, request: Request, kind: type[_Request]) -> AsyncIterator[_Request]:
        """The checked request of a body, whose memory counts until the context is left.

        Raises ApiError.
        """
        async with self.read_as(request, lambda fields: kind) as checked:
            yield checked

    @asynccontextmanager
    async def read_as(
        self, request: Request, kind_of: Callable[[dict[str, Any]], type[_Request]]
    ) -> AsyncIterator[_Request]:
        """As `read`, where the fields of the body say which kind of request it is.

        `kind_of` may add fields, and is called on any thread.
        """
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            # Also what keeps a page in a browser from posting here without asking first.
            raise ApiError(415, "the body must have the content type application/json")
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self._settings.body_seconds):
                    await self._receive(request, body)
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time") from None
            size = len(body)
            if size <= SMALL_BYTES:
                checked = self._check(body, kind_of)
            else:
                checked = await self._workers.run(self._check, body, kind_of)
            yield checked
        finally:
            self._room += len(body)
            self._freed += len(body)
            if self._freed >= _MUCH_BYTES and self._room == self._all_room:
                self._freed = 0
                self._workers.start(release_memory)

    async def _receive(self, request: Request, body: bytearray) -> None:
        limit = self._settings.max_body_bytes
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise _too_large(limit)
        async for chunk in request.stream():
            body += chunk
            self._room -= len(chunk)
            if len(body) > limit:
                raise _too_large(limit)
            if self._room < 0 and len(body) > SMALL_BYTES:
                raise ApiError(
                    503, "too many large bodies are in memory", code="bodies_full", retry_seconds=1
                )

    def _check(
        self, body: bytearray, kind_of: Callable[[dict[str, Any]], type[_Request]]
    ) -> _Request:
        fields = parse_json(body, self._max_integers)
        return check_fields(fields, kind_of(fields), self._settings.max_messages)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


def check_fields(body: dict[str, Any], kind: type[_Request], max_messages: int = 4096) -> _Request:
    """The request that a parsed body stands for. Raises ApiError naming the field."""
    fields = _settle(body, kind, "")
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = _settle(options, StreamOptions, "stream_options.")
    messages = fields.get("messages")
    if isinstance(messages, list):
        if len(messages) > max_messages:
            raise _refused(
                "messages", f"has {len(messages)} entries of at most {max_messages}", "too_long"
            )
        num_parts = sum(map(_num_parts, messages))
        if num_parts > max_messages:
            reason = f"have {num_parts} parts of at most {max_messages}"
            raise _refused("messages", reason, "too_long")
        fields["messages"] = [_settle_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options requires stream: true", param="stream_options")
    # Nobody reads them, and they may be as long as the body.
    return request.model_copy(update=dict.fromkeys(IGNORED))


def _num_parts(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    return len(content) if isinstance(content, list) else 0


def _settle_message(message: Any, place: str) -> Any:
    if not isinstance(message, dict):
        return message
    fields = _settle(message, ChatMessage, f"{place}.")
    if isinstance(parts := fields.get("content"), list):
        fields["content"] = [
            _settle(part, TextPart, f"{place}.content[{i}].")
            # Another type is refused as such, not for the fields that come with it.
            if isinstance(part, dict) and part.get("type") == "text"
            else part
            for i, part in enumerate(parts)
        ]
    return fields


_Object = type[GenerationRequest] | type[StreamOptions] | type[ChatMessage] | type[TextPart]


def _settle(body: dict[str, Any], kind: _Object, place: str) -> dict[str, Any]:
    """Takes out what changes nothing; refuses what is not built, and what nobody knows."""
    known = kind.model_fields
    fields = {}
    for name, value in body.items():
        if name in known:
            if value is not None or known[name].is_required():
                fields[name] = value
        elif name in kind.NOT_BUILT:
            if value is not None and not any(_same(value, n) for n in kind.NOT_BUILT[name]):
                raise _refused(place + name, "is not supported", "not_built")
        else:
            reason = f"is not a field of this {'request' if not place else 'object'}"
            near = did_you_mean(name, [*known, *kind.NOT_BUILT])
            raise _refused(
                place + name[:80],
                reason + (f"; {near}" if near else ""),
                "unknown_field",
            )
    return fields


def _same(value: Any, neutral: Any) -> bool:
    # A bool is not a number here, whatever Python says.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _refused(param: str, reason: str, code: str) -> ApiError:
    return ApiError(400, f"{param} {reason}", param=param, code=code)


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part[:80]}" if param else part[:80]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "too_short":
        reason = "it is empty"
    return ApiError(400, f"{param}: {reason[:1].lower()}{reason[1:]}", param=param)
