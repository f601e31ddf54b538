"""Chat templates: sandboxed jinja2 that renders what transformers' apply_chat_template renders."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from ..ir.errors import ArtifactError, RequestError

Message = Mapping[str, Any]

_MARK = "infc:the-answer-goes-on-here "
"""Stands behind a message that is to go on while it is rendered; templates may trim its blank."""

_ROLES = ("system", "developer", "user", "assistant", "tool")

# One thought under the names that templates know it by; the first is the usual one.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_SAYS_SOMETHING = ("content", "tool_calls", *_REASONING_FIELDS)


class ChatTemplate:
    """A compiled template. `constants` are what it may name beside the messages (`bos_token`)."""

    def __init__(self, source: str, constants: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ArtifactError(
                f"the chat template cannot be read: {error}",
                where="tokenizer/chat_template.jinja",
            ) from None
        self._constants = dict(constants)
        self._source = source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; RequestError where the template refuses it.

        With `continue_final_message` it ends where the text of the last message does, and no
        turn is opened for the answer.
        """
        self._check_messages(messages)
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "the answer cannot both go on with the last message and open a turn of its own",
                field="add_generation_prompt",
            )
        plain = [_plain(message) for message in messages]
        if continue_final_message:
            _mark_end(plain[-1])
        names = {
            **self._constants,
            **_plain(variables or {}),
            "messages": [_with_reasoning(message) for message in plain],
            "tools": _plain(list(tools)) if tools is not None else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(names)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", field="messages"
            ) from None
        return _up_to_mark(text) if continue_final_message else text

    def _check_messages(self, messages: Any) -> None:
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
            raise RequestError(
                "messages must be a list with at least one message", field="messages"
            )
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            if not isinstance(message, Mapping):
                problem = f"is no mapping of role and content: {message!r:.80}"
                raise RequestError(f"{where} {problem}", field="messages")
            self._check_role(message.get("role"), where)
            if all(message.get(name) is None for name in _SAYS_SOMETHING):
                raise RequestError(f"{where} has no content", field="messages")

    def _check_role(self, role: Any, where: str) -> None:
        """Most templates pass over roles that they don't know, or write them down as they are."""
        if not isinstance(role, str):
            given = (
                "has no role" if role is None else f"has the role {role!r:.80}, which is no text"
            )
            raise RequestError(f"{where} {given}", field="messages")
        # Templates may know more: they compare with names in quotes.
        if role in _ROLES or f"'{role}'" in self._source or f'"{role}"' in self._source:
            return
        close = difflib.get_close_matches(role, _ROLES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(_ROLES)}"
        raise RequestError(f"{where}.role is {role!r:.80} ({hint})", field="messages")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training: the body is what counts."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` as a template may use it: called, and `fromkeys`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _mark_end(message: dict[str, Any]) -> None:
    """Put the mark behind the text of a message, as a string or as the last part with text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _MARK
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += _MARK
            return
    raise RequestError("the last message has no text to go on with", field="messages")


def _up_to_mark(text: str) -> str:
    """The prompt in front of the mark; trimmed where the template trims what messages end in."""
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise RequestError(
            "the chat template leaves out the end of the last message, so nothing can go on there",
            field="messages",
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = (message[key] for key in _REASONING_FIELDS if message.get(key) is not None)
    reasoning = next(found, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """JSON data alone: any other object could hand the template a method to call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise RequestError(f"a chat holds JSON data, not {type(value).__name__}", field="messages")
