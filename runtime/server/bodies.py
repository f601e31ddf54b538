"""From the bytes of a request to its wire type: bounded, strict, each refusal naming its field."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections import Counter
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import ValidationError

from .errors import ApiError
from .protocol import ChatMessage, GenerationRequest, StreamOptions, TextPart
from .settings import ServerSettings

_Request = TypeVar("_Request", bound=GenerationRequest)


async def read_request(
    request: Request, kind: type[_Request], settings: ServerSettings
) -> _Request:
    """Reads, parses and checks the body of `request`. Raises ApiError."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        # Also what keeps a page in a browser from posting here without asking first.
        raise ApiError(415, "the body must have the content type application/json")
    try:
        async with asyncio.timeout(settings.body_seconds):
            body = await _read_body(request, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time") from None
    return check_fields(parse_json(body), kind, settings.max_messages)


async def _read_body(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds: UTF-8, no NaN, no key twice, no half of a character."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
        if "\\u" in text:  # an escape may be half a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise _not_json("it holds half of a surrogate pair") from None
    except ValueError as error:  # also of an integer with thousands of digits
        raise _not_json(str(error)) from None
    if not isinstance(value, dict):
        raise _not_json("it is not an object")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return result


def _not_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def check_fields(body: dict[str, Any], kind: type[_Request], max_messages: int = 4096) -> _Request:
    """The request that a parsed body stands for. Raises ApiError naming the field."""
    fields = _settle(body, kind, "")
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = _settle(options, StreamOptions, "stream_options.")
    messages = fields.get("messages")
    if isinstance(messages, list):
        if len(messages) > max_messages:
            raise _refused("messages", f"has {len(messages)} of at most {max_messages}", "too_long")
        fields["messages"] = [_settle_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    return request


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
                raise _refused(place + name, "is not built yet", "not_built")
        else:
            reason = f"is no field of this {'request' if not place else 'object'}"
            near = difflib.get_close_matches(name[:80], [*known, *kind.NOT_BUILT], 1, 0.6)
            raise _refused(
                place + name[:80],
                reason + (f"; did you mean {near[0]}?" if near else ""),
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
