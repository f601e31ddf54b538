"""The wire: what answers look like, for the description; they are written as plain data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Count = Annotated[int, Field(ge=0)]
_FinishReason = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class ErrorDetails(_Answer):
    """What was wrong. `param` names the field of the request; `code` is for programs."""

    message: Annotated[str, Field(min_length=1, max_length=500)]
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Any answer that is not 200, and the last event of a stream that failed."""

    error: ErrorDetails


class PromptTokensDetails(_Answer):
    """Of the prompt's tokens, those whose KV was in the cache."""

    cached_tokens: _Count


class UsageAnswer(_Answer):
    """Tokens of all prompts and completions."""

    prompt_tokens: _Count
    completion_tokens: _Count
    total_tokens: _Count
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(_Answer):
    """One token that could have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One token that is, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(_Answer):
    """Parallel lists, one entry a token. The first token of an echoed prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[_Count]


class CompletionChoice(_Answer):
    """One completion, or what a chunk adds to it; its end has a reason."""

    index: _Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: _FinishReason | None
    token_ids: list[_Count] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class AssistantMessage(_Answer):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One next turn."""

    index: _Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: _FinishReason
    token_ids: list[_Count] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class _Head(_Answer):
    id: str
    created: int
    model: str


class CompletionAnswer(_Head):
    """A whole answer."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ChatAnswer(_Head):
    """A whole answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionChunk(_Head):
    """An event of a stream; the last has `usage` and no choice, where that was asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageAnswer | None = None


class Delta(_Answer):
    """What a chunk adds to the assistant's turn; the first names the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(_Answer):
    """What a chunk adds to one next turn."""

    index: _Count
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: _FinishReason | None
    token_ids: list[_Count] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class ChatChunk(_Head):
    """An event of a stream; the last has `usage` and no choice, where that was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None


class ModelCard(_Answer):
    """The model, by one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["infc"]
    max_model_len: _Count


class CertifiedModel(ModelCard):
    """The model with the certificate of its accuracy, if its artifact has one."""

    certificate: dict[str, Any] | None


class ModelList(_Answer):
    """Every name of the model."""

    object: Literal["list"]
    data: list[ModelCard]


class ReplicaHealth(_Answer):
    """Whether the process of one engine is ready, and how often it was started again."""

    state: Literal["starting", "ready", "waiting", "given up"]
    restarts: int


class Health(_Answer):
    """Whether requests are answered; with `--replicas`, the state of each."""

    status: str
    replicas: list[ReplicaHealth] | None = None


class Version(_Answer):
    """What serves."""

    version: str
    backend: str
