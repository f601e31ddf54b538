"""The description at `/openapi.json`: requests with their ranges, answers, and every refusal."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .answers import ErrorAnswer
from .protocol import NEUTRAL, ChatMessage, GenerationRequest, StreamOptions, TextPart
from .settings import ServerSettings

_REASONS = {
    400: "The request is not valid, or cannot be served; `param` names the field.",
    401: "No valid API key.",
    404: "Unknown model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    429: "Too many waiting requests; retry after `Retry-After` seconds.",
    500: "Internal server error, or the completion failed.",
    503: "The engine has stopped or is stopping, or too many connections are open.",
    504: "The answer took too long.",
}
_Responses = dict[int | str, dict[str, Any]]


def answers(kind: type[BaseModel], *errors: int) -> _Responses:
    """`responses` of a route that gives `kind`, or one of the errors."""
    good: dict[str, Any] = {"model": kind, "description": "The answer."}
    return {200: good, **{status: error(status) for status in errors}}


def generation_answers(kind: type[BaseModel], chunk: type[BaseModel]) -> _Responses:
    """`responses` of a route that generates, also as a stream of `chunk`s."""
    responses = answers(kind, *_REASONS)
    either = [_inlined(chunk), _inlined(ErrorAnswer)]
    data = [
        {"const": "[DONE]"},
        {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": either},
        },
    ]
    event = {
        "type": "object",
        "description": "One event of the stream, which is the answer where `stream` is true.",
        "properties": {"data": {"anyOf": data}},
        "required": ["data"],
    }
    responses[200]["content"] = {"text/event-stream": {"schema": event}}
    return responses


def _inlined(kind: type[BaseModel]) -> Any:
    schema = kind.model_json_schema()
    return _inline(schema, schema.pop("$defs", {}))


def error(status: int) -> dict[str, Any]:
    """The entry of `responses` for one status."""
    described: dict[str, Any] = {"model": ErrorAnswer, "description": _REASONS[status]}
    if status == 429:
        wait = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
        described["headers"] = {"Retry-After": wait}
    return described


def body_of(kind: type[GenerationRequest], settings: ServerSettings) -> dict[str, Any]:
    """`requestBody` of a route: what it takes, what it takes for nothing, and no other field.

    The library would read and check the body itself, and answer 422 in a shape of its own.
    """
    schema = kind.model_json_schema()
    parts = schema.pop("$defs")
    for part in (ChatMessage, StreamOptions, TextPart):
        if part.__name__ in parts:
            _open(parts[part.__name__], part.NOT_BUILT)
    _open(schema, kind.NOT_BUILT)
    _narrow(schema["properties"], settings)
    content = {"schema": _inline(schema, parts), "examples": _examples(kind, settings)}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _examples(kind: type[GenerationRequest], settings: ServerSettings) -> dict[str, Any]:
    body: dict[str, Any] = {"model": settings.model_name, "max_tokens": 16, "temperature": 0}
    if "prompt" in kind.model_fields:
        body["prompt"] = "def fibonacci(n):"
    else:
        body["messages"] = [{"role": "user", "content": "Write the function read_lines."}]
    return {"whole": {"value": body}, "streamed": {"value": {**body, "stream": True}}}


def _open(schema: dict[str, Any], neutral: NEUTRAL) -> None:
    """Lets in what the code lets in: null for what may be left out, and neutral values."""
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        kinds = field.get("anyOf", [field])
        if name not in required and {"type": "null"} not in kinds:
            doc = {key: field.pop(key) for key in ("title", "default") if key in field}
            kinds = field.get("anyOf", [field])
            schema["properties"][name] = {**doc, "anyOf": [*kinds, {"type": "null"}]}
    for name, values in neutral.items():
        schema["properties"][name] = {
            "description": "Not built: any other value is refused.",
            "enum": [*values, None],
        }


def _narrow(fields: dict[str, Any], settings: ServerSettings) -> None:
    """The ranges that this server has been given."""
    fields["model"]["enum"] = list(settings.model_names)
    fields["logit_bias"]["anyOf"][0]["additionalProperties"] = False
    for name, key, most in (
        ("n", "maximum", settings.max_choices),
        ("best_of", "maximum", settings.max_choices),
        ("logprobs", "maximum", settings.max_logprobs),
        ("top_logprobs", "maximum", settings.max_logprobs),
        ("prompt_logprobs", "maximum", settings.max_logprobs),
        ("stop", "maxItems", settings.max_stop_strings),
        ("messages", "maxItems", settings.max_messages),
    ):
        field = fields.get(name, {})
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "array"):
                kind[key] = min(most, kind.get(key, most))
    for kind in fields.get("prompt", {}).get("anyOf", ()):
        if kind["type"] == "array" and kind["items"]["type"] != "integer":
            kind["maxItems"] = settings.max_prompts


def _inline(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema without references: the description has parts of its own."""
    if isinstance(schema, list):
        return [_inline(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: _inline(value, parts) for name, value in schema.items()}
