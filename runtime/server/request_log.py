"""Around every request: its id, its count in the metrics, and a line as it ends."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..log import REQUEST_ID, ServerLog
from .errors import ApiError, as_api_error
from .settings import ServerSettings
from .usage import Usage

if TYPE_CHECKING:
    from .metrics import ServerMetrics

_MAX_PATH = 200  # characters
_MAX_PROMPT = 4000  # characters
_MAX_ITEMS = 2000  # of a list within it, which are enough for so many characters
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """What a route tells of a request that it serves."""

    request_id: str = "-"
    answer_id: str | None = None
    usage: Usage | None = None
    prompt: Any = None
    first_token_time: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error: ApiError | None = None


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request."""
    record = scope["infc.record"]
    assert isinstance(record, RequestRecord)
    return record


class RequestLog:
    """Middleware: `X-Request-Id` in and out, the request's count, and its line where wanted.

    The line is `METHOD PATH STATUS ID ANSWER PROMPT+ANSWER tokens SECONDS s, ...`. An id that the
    client gives is kept where it is short and of harmless characters; any other is replaced.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._log = ServerLog(settings.log_format)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        # Routed as GET: what answers that answers HEAD, and the protocol leaves out the body.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        record = RequestRecord(_request_id(scope))
        inner = {**scope, "method": method, "infc.record": record}
        REQUEST_ID.set(record.request_id)
        status, whole = "-", False

        async def watched(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                if headers.get("Allow") == "GET":
                    headers["Allow"] = "GET, HEAD"
                status = str(message["status"])
            await send(message)
            if message["type"] == "http.response.body":
                whole = not message.get("more_body", False)

        try:
            await self._app(inner, receive, watched)
        except Exception as error:
            answer = record.error = as_api_error(error)  # which logs it
            if status == "-":
                await answer.response()(inner, receive, watched)
        finally:
            # The route as declared: what clients write would be labels without end.
            endpoint = getattr(inner.get("route"), "path", "other")
            self._metrics.http_requests[endpoint, status] += 1
            if self._settings.log_requests:
                self._write(scope, record, status, begun, whole=whole)

    def _write(
        self, scope: Scope, record: RequestRecord, status: str, begun: float, *, whole: bool
    ) -> None:
        # Percent-encoded, so nobody writes a line of their own.
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:_MAX_PATH]
        used = record.usage.as_json() if record.usage is not None else {}
        prompt, answer = used.get("prompt_tokens", 0), used.get("completion_tokens", 0)
        spent, first = time.monotonic() - begun, record.first_token_time
        parts = [f"{prompt}+{answer} tokens {spent:.2f} s"]
        if first is not None:
            parts.append(f"first after {first - begun:.2f} s")
        parts += sorted(set(record.finish_reasons))
        if not whole:
            parts.append("cut off")
        refusal = record.error.body["error"] if record.error is not None else None
        if refusal is not None:
            code, param, text = (refusal[name] for name in ("code", "param", "message"))
            named = [code, None if param is None or param in text else param]
            parts.append(": ".join([*filter(None, named), text]))
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "method": scope["method"],
            "path": path,
            "status": int(status) if status.isdecimal() else None,
            "answer_id": record.answer_id,
            "prompt_tokens": prompt,
            "cached_tokens": used.get("prompt_tokens_details", {}).get("cached_tokens", 0),
            "completion_tokens": answer,
            "time_to_first_token_seconds": None if first is None else round(first - begun, 6),
            "seconds": round(spent, 6),
            "finish_reasons": record.finish_reasons,
            "cut_off": not whole,
            "error": refusal,
        }
        if self._settings.log_prompts and record.prompt is not None:
            fields["prompt"] = json.dumps(_begin_of(record.prompt))[:_MAX_PROMPT]
            parts.append(f"prompt {fields['prompt']}")
        head = f"{scope['method']} {path} {status} {record.request_id} {record.answer_id or '-'}"
        self._log.event("request", f"{head} {', '.join(parts)}", **fields)


def _begin_of(prompt: Any) -> Any:
    """What is enough for the log, also of a prompt of megabytes."""
    if isinstance(prompt, str):
        return prompt[:_MAX_PROMPT]
    if isinstance(prompt, dict):
        return {name: _begin_of(value) for name, value in prompt.items()}
    return [_begin_of(item) for item in prompt[:_MAX_ITEMS]] if isinstance(prompt, list) else prompt


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given):
                return str(given)
    return f"req-{secrets.token_hex(12)}"
