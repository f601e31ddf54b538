"""Chat templates: sandboxed jinja2 that renders what transformers' apply_chat_template renders."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2

from ...ir.errors import ArtifactError, RequestError
from .chat_messages import (
    EMPTY_TAG,
    Message,
    PartsForm,
    as_json,
    as_messages,
    count_characters,
    mark_end,
)
from .template_meter import RenderLimits, TooMuch, metered
from .template_sandbox import Sandbox
from .template_text import (
    END,
    FROM_TEMPLATE,
    TAG,
    from_template,
    origins_of,
    plain,
    with_origins,
)

MAX_SOURCE_CHARACTERS: Final = 1 << 20
MAX_CHAT_CHARACTERS: Final = 1 << 28

_OWN_NAMES: Final = ("messages", "tools", "add_generation_prompt")
_REFUSALS: Final = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
    RuntimeError, MemoryError,
)  # fmt: skip

_PROBE_LIMITS: Final = RenderLimits(seconds=0.5, characters=1 << 20)
_PROBE: Final = "infc looks whether this comes out"
_PROBE_END: Final = "and this"


class ChatTemplate:
    """A compiled template. `constants` are what it may name beside the messages (`bos_token`).

    Raises ArtifactError where it cannot be read.
    """

    def __init__(
        self, source: str, constants: Mapping[str, str], limits: RenderLimits | None = None
    ) -> None:
        self._limits = limits or RenderLimits()
        self._source = source
        self._constants = {name: from_template(text) for name, text in constants.items()}
        sandbox = Sandbox()
        try:
            if len(source) > MAX_SOURCE_CHARACTERS:
                raise TooMuch(f"it has more than {MAX_SOURCE_CHARACTERS} characters")
            with metered(self._limits):
                self._template = sandbox.open(source)
        except (
            *_REFUSALS,
            SyntaxError,
            TooMuch,
        ) as error:  # also of the Python that jinja makes of it
            raise ArtifactError(
                f"the chat template cannot be read: {error!s:.500}",
                where="tokenizer/chat_template.jinja",
            ) from None
        self._literals = sandbox.literals
        self._is_endless = False

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_characters: int | None = None,
    ) -> str:
        """The prompt of a conversation; RequestError where the template refuses it.

        With `continue_final_message` it ends where the text of the last message does, and no
        turn is opened for the answer. `max_characters` bounds what goes in, before anything is
        done with it, and what comes out. The text knows which of it the template wrote.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "the answer cannot both continue the last message and begin a new turn",
                field="add_generation_prompt",
            )
        most = MAX_CHAT_CHARACTERS if max_characters is None else max_characters
        size = count_characters([messages, tools, variables], most)
        _check_size(size, most)
        given = _variables(variables)
        names = {
            **self._constants,
            **given,
            "messages": as_messages(messages, knows_role=self._knows_role, parts=self._parts),
            "tools": _tools(tools),
            "documents": given.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        if continue_final_message:
            mark_end(names["messages"][-1])
        text = self._run(names, size)
        if continue_final_message:
            text = _up_to_end(text)
        _check_size(len(text), most)
        return text

    @functools.cached_property
    def written(self) -> str:
        """Whatever text the template writes itself: its literals, and what it makes of roles."""
        found = [*self._literals, *map(plain, self._constants.values())]
        for role in ("system", "user", "assistant", "tool"):
            message = {"role": from_template(role), "content": _PROBE}
            before = [{"role": from_template("user"), "content": _PROBE}]
            for conversation in ([message], [*before, message]):
                if (text := self._try(conversation)) is not None:
                    own = zip(text, origins_of(text), strict=True)
                    found.append("".join(c if o == FROM_TEMPLATE else "\0" for c, o in own))
        return "\0".join(found)

    @functools.cached_property
    def _parts(self) -> PartsForm:
        """How it reads text parts: seen from what it makes of some."""
        parts = [{"type": "text", "text": text} for text in (_PROBE, _PROBE_END)]
        of_text, of_parts = (
            self._try([{"role": from_template("user"), "content": content}]) or ""
            for content in (_PROBE, parts)
        )
        # Some write the list itself down, as Python or as JSON does.
        as_data = "'text'" in of_parts or '"text"' in of_parts
        if as_data or not (_PROBE in of_parts or _PROBE_END in of_parts):
            return "joined"
        return "kept" if _PROBE in of_text else "only"

    @property
    def is_endless(self) -> bool:
        """Whether it did too much with the shortest of conversations."""
        _ = self.written, self._parts
        return self._is_endless

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        names = {
            **self._constants,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        if self._is_endless:
            return None
        try:
            with metered(_PROBE_LIMITS):
                return self._template.render(names)
        except TooMuch:
            self._is_endless = True
        except MemoryError:  # says nothing of the template: it is not to be remembered
            raise
        except _REFUSALS:
            pass  # it wants other messages
        return None

    def _run(self, names: dict[str, Any], size: int) -> str:
        try:
            with metered(self._limits, size):
                return self._template.render(names)
        except TooMuch as error:
            raise RequestError(
                f"the chat template exceeds its limits with these messages: {error}",
                field="messages",
                hint="send fewer or shorter messages, or format the prompt yourself",
            ) from None
        except _REFUSALS as error:
            raise RequestError(
                f"the chat template rejects these messages: {error!s:.500}", field="messages"
            ) from None

    def _knows_role(self, role: str) -> bool:
        """Templates may know more roles than the usual: they compare with names in quotes."""
        return f"'{role}'" in self._source or f'"{role}"' in self._source


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise RequestError(f"the messages have more than {most} characters", field="messages")


def _variables(variables: Any) -> dict[str, Any]:
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise RequestError("template variables must be names with values", field="variables")
    for name in _OWN_NAMES:
        if name in variables:
            raise RequestError(
                f"the template variable {name!r} is reserved",
                field="variables",
                hint="use another name",
            )
    found: dict[str, Any] = as_json(variables, "variables")
    return found


def _tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(t, Mapping) for t in tools):
        raise RequestError("tools must be a list of JSON objects", field="tools")
    found: list[Any] = as_json(tools, "tools")
    return found


def _up_to_end(text: str) -> str:
    """The prompt up to the end of the last message, wherever it was last written."""
    origins = origins_of(text)
    if (end := max(origins.rfind(END), origins.rfind(END | FROM_TEMPLATE))) >= 0:
        return text[: end + 1]
    end = origins.rfind(TAG) + 1
    for tag in (EMPTY_TAG, EMPTY_TAG.strip()):
        if end and text[:end].endswith(tag):
            head = text[: end - len(tag)]
            if tag is not EMPTY_TAG:  # trimmed: as transformers does it, so is what comes before
                head = head[: len(head.rstrip())]
            return _without_tags(head)
    raise RequestError(
        "the chat template leaves out the end of the last message, so it cannot be continued",
        field="messages",
    )


def _without_tags(text: str) -> str:
    pairs = zip(plain(text), origins_of(text), strict=True)
    kept = [(char, origin) for char, origin in pairs if origin != TAG]
    return with_origins("".join(c for c, _ in kept), bytes(o for _, o in kept))
