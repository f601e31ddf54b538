"""Conversations in the one form that chat templates get, from whichever door they come."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from ...ir.errors import RequestError
from ...ir.nearest import did_you_mean
from .template_text import END, TAG, concat, from_template, with_origins

Message = Mapping[str, Any]

PartsForm = Literal["joined", "kept", "only"]
"""How a template reads the text parts of a message: joined to a string before, several as they are,
or nothing but parts."""

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_MAX_DEPTH: Final = 128
_SPEAKERS: Final = ("system", "developer", "user", "assistant")
_NAME: Final = re.compile(r"[A-Za-z][\w-]*", re.ASCII)

# One thought under the names that templates know it by; the first is the usual one.
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")
_SAYS_SOMETHING: Final = ("content", "tool_calls", *_REASONING_FIELDS)

EMPTY_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "
"""What transformers ends a message in that is to go on, so that templates see it the same way."""


def as_messages(
    messages: Any, *, knows_role: Callable[[str], bool], parts: PartsForm
) -> list[dict[str, Any]]:
    """Messages of JSON data, null fields left out, text parts as the template reads them.

    RequestError where they are none, naming the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("messages must be a list with at least one message", field="messages")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _refused(where, f"is not a mapping of role and content: {message!r:.80}")
        plain = {k: v for k, v in as_json(message, "messages").items() if v is not None}
        _check_role(plain.get("role"), where, knows_role)
        if plain["role"] == "developer" and not knows_role("developer"):
            plain["role"] = "system"  # as all but the newest models call it
        if not any(name in plain for name in _SAYS_SOMETHING):
            raise _refused(where, "has no content")
        if "content" in plain:
            speaks = plain["role"] in _SPEAKERS
            plain["content"] = _content(plain["content"], f"{where}.content", parts, speaks)
        if _NAME.fullmatch(plain["role"]):  # the template may build a control token of it
            plain["role"] = from_template(plain["role"])
        result.append(_with_reasoning(plain))
    return result


def mark_end(message: dict[str, Any]) -> None:
    """Mark where the text of a message ends, as a string or as the last of its parts."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = _ending(content)
    elif isinstance(content, list) and content and _is_text(content[-1]):
        content[-1]["text"] = _ending(content[-1]["text"])
    else:
        raise RequestError("the last message has no text to continue", field="messages")


def as_json(value: Any, field: str) -> Any:
    """JSON data alone: any other object could hand the template a method to call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {as_json(key, field): as_json(item, field) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item, field) for item in value]
    if isinstance(value, str):  # of an enumeration, say
        return str.__str__(value)
    raise RequestError(f"messages must be JSON data, not {type(value).__name__}", field=field)


def count_characters(value: Any, most: int) -> int:
    """The characters that JSON data holds, some for whatever is no string; no further than `most`.

    RequestError where it is nested too deeply, as what holds itself is.
    """
    total = 0
    stack = [(value, 0)]
    while stack and total <= most:
        one, depth = stack.pop()
        if isinstance(one, str):
            total += len(one)
            continue
        total += 4
        if depth > _MAX_DEPTH:
            raise RequestError("the messages are nested too deeply", field="messages")
        if isinstance(one, Mapping):
            stack += ((part, depth + 1) for pair in one.items() for part in pair)
        elif isinstance(one, (list, tuple)):
            stack += ((part, depth + 1) for part in one)
    return total


def _refused(where: str, problem: str) -> RequestError:
    return RequestError(f"{where} {problem}", field="messages")


def _check_role(role: Any, where: str, knows_role: Callable[[str], bool]) -> None:
    """Most templates pass over roles that they don't know, or write them down as they are."""
    if role is None:
        raise _refused(where, "has no role")
    if not isinstance(role, str):
        raise _refused(where, f"has the role {role!r:.80}, which is not a string")
    if role in _ROLES or knows_role(role):
        return
    hint = did_you_mean(role, _ROLES, f"one of {', '.join(_ROLES)}")
    raise _refused(f"{where}.role", f"is {role!r:.80} ({hint})")


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _content(content: Any, where: str, form: PartsForm, speaks: bool) -> Any:
    """Text, or text parts. What a tool gave may be any data: templates write it as JSON."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if form == "only" else content
    if not speaks and not (isinstance(content, list) and all(map(_is_text, content))):
        return content
    if not isinstance(content, list):
        raise _refused(where, f"is neither text nor a list of text parts: {content!r:.80}")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise _refused(f"{where}[{index}]", f"is not a text part: {kind!r:.80}")
        if not isinstance(part.get("text"), str):
            raise _refused(f"{where}[{index}]", "has no text")
        texts.append(part["text"])
    if form == "only" or (form == "kept" and len(texts) > 1):
        return content
    return "".join(texts)


def _ending(text: str) -> str:
    """The text, its last character that is not blank and all behind it marked as its end."""
    kept = len(text.rstrip())
    if not kept:
        return concat((text, with_origins(EMPTY_TAG, bytes((TAG,)) * len(EMPTY_TAG))))
    return with_origins(text, bytes(kept - 1) + bytes((END,)) * (len(text) - kept + 1))


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = (message[key] for key in _REASONING_FIELDS if message.get(key) is not None)
    reasoning = next(found, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
