"""What the Python face takes: one prompt or many, parameters for all or each, conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ...ir.errors import RequestError

if TYPE_CHECKING:
    from ..sampling.sampling_params import SamplingParams
    from ..text.chat_messages import Message
    from ..text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""


class TemplateOptions(TypedDict, total=False):
    """How a conversation becomes a prompt.

    `add_generation_prompt` (true unless the last message goes on) opens a turn for the answer;
    `continue_final_message` lets the answer go on with the text of the last message; `tools` and
    `template_variables` are handed to the template.
    """

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    template_variables: Mapping[str, Any] | None


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts from one or many; text, or token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError("prompts must be text, token ids, or a list of them", field="prompt")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]
    for index, item in enumerate(prompts):
        if isinstance(item, bytes) or not isinstance(item, Sequence):
            raise RequestError(
                f"{item!r:.80} is not a prompt", field="prompt", where=f"prompts[{index}]"
            )
    return list(prompts)


def as_params(params: Any, count: int) -> list[Any]:
    """The parameters of each of `count` prompts; the engine checks what they are."""
    if not isinstance(params, Sequence) or isinstance(params, (str, bytes)):
        return [params] * count
    if len(params) != count:
        raise RequestError(
            f"{len(params)} params were given for {count} prompts",
            field="params",
            hint="pass one for all prompts, or one for each",
        )
    return list(params)


def one_of(
    params: SamplingParams | Sequence[SamplingParams] | None,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
) -> Any:
    """The parameters under whichever of the two names they were given."""
    if params is not None and sampling_params is not None:
        raise RequestError("params and sampling_params are the same: pass only one", field="params")
    return sampling_params if params is None else params


def is_one_conversation(messages: Any) -> bool:
    """Whether these are the messages of one conversation, and not a list of conversations.

    Raises RequestError where they are neither.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError(
            "messages must be a list of messages, or of conversations", field="messages"
        )
    kinds = {isinstance(item, Mapping) for item in messages}
    if len(kinds) > 1:
        raise RequestError("messages mixes messages and conversations", field="messages")
    return kinds == {True}


def encode_conversation(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    **options: Unpack[TemplateOptions],
) -> list[int]:
    """The tokens of a conversation under the artifact's template.

    RequestError where the artifact has no tokenizer or no template, or the template refuses
    the messages.
    """
    if unknown := set(options) - set(TemplateOptions.__annotations__):
        raise TypeError(f"chat has no parameter {min(unknown)!r}")
    if tokenizer is None:
        raise RequestError(
            "this model has no tokenizer, so it has no chat template either",
            field="messages",
            hint="pass token ids to generate",
        )
    goes_on = options.get("continue_final_message", False)
    return tokenizer.encode_chat(
        messages,
        add_generation_prompt=options.get("add_generation_prompt", not goes_on),
        continue_final_message=goes_on,
        tools=options.get("tools"),
        variables=options.get("template_variables"),
    )
