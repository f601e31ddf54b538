"""The wire: requests as OpenAI's API writes them, strict, and apart from the engine's types."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ..sampling.params_checks import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from ..sampling.sampling_params import MAX_CHOICES, MAX_LOGPROBS, SamplingParams

NEUTRAL = dict[str, tuple[Any, ...]]
"""Fields that are known and not built, and the values that ask for what happens anyway."""

_MAX_INT = 2**31 - 1
_MAX_TOKENS_LISTED = 4096

_NOT_BUILT: NEUTRAL = {"service_tier": ("auto", "default")}


class _Wire(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


class StreamOptions(_Wire):
    """What a stream holds beside its chunks."""

    NOT_BUILT: ClassVar[NEUTRAL] = {"include_obfuscation": (False,)}

    include_usage: bool = False


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    if not isinstance(value, (str, list)):
        raise ValueError("must be a string or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _within(low: float, high: float) -> Any:
    return Field(ge=low, le=high)


_TokenId = Annotated[int, _within(0, _MAX_INT)]
_TokenIds = Annotated[list[_TokenId], Field(max_length=_MAX_TOKENS_LISTED)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Stops = Annotated[list[_Stop], Field(max_length=MAX_STOP_STRINGS)]
_Penalty = Annotated[float, _within(-2, 2)]
_NumTokens = Annotated[int, _within(0, _MAX_INT)]
_NumLogprobs = Annotated[int, _within(0, MAX_LOGPROBS)]
_NumChoices = Annotated[int, _within(1, MAX_CHOICES)]


def _few_enough(value: object) -> object:
    """Counts before each is looked at, which for a mapping comes first otherwise."""
    if isinstance(value, dict) and len(value) > _MAX_TOKENS_LISTED:
        raise ValueError(f"has {len(value)} tokens of at most {_MAX_TOKENS_LISTED}")
    return value


_Bias = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")],
        Annotated[float, _within(-100, 100)],
    ],
    Field(max_length=_MAX_TOKENS_LISTED),
    BeforeValidator(_few_enough),
]


class GenerationRequest(_Wire):
    """The fields that completions and chats share; one that is null is as one left out."""

    NOT_BUILT: ClassVar[NEUTRAL] = _NOT_BUILT

    model: str
    temperature: Annotated[float, _within(0, 100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, _within(0, _MAX_INT)] | None = None
    min_p: Annotated[float, _within(0, 1)] | None = None
    repetition_penalty: Annotated[float, _within(0.01, 100)] | None = None
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: _Bias = {}
    allowed_token_ids: Annotated[_TokenIds, Field(min_length=1)] | None = None
    banned_token_ids: _TokenIds = []
    seed: Annotated[int, _within(-(2**63), 2**64 - 1)] | None = None
    n: _NumChoices = 1
    max_tokens: _NumTokens | None = None
    min_tokens: _NumTokens = 0
    stop: Annotated[_Stops, BeforeValidator(_as_list, json_schema_input_type=_Stop | _Stops)] = []
    stop_token_ids: _TokenIds = []
    ignore_eos: bool = False
    prompt_logprobs: _NumLogprobs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    # For whoever keeps the books: accepted, and of no effect here.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of the stream counts the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: dict[str, Any], **own: Any) -> SamplingParams:
        """The engine's parameters; `own` are those that the routes spell in different ways.

        Raises RequestError for values that contradict each other.
        """
        given = {name: getattr(self, name) for name in _SAMPLING if name in self.model_fields_set}
        chosen = {name: value for name, value in given.items() if value is not None}
        if "logit_bias" in self.model_fields_set:
            chosen["logit_bias"] = {int(token): value for token, value in self.logit_bias.items()}
        return SamplingParams(**{**defaults, **chosen, **own})


_SAMPLING = tuple(
    name
    for name in SamplingParams.__dataclass_fields__
    if name in GenerationRequest.model_fields and name != "logit_bias"
)

IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "store", "user"})
"""Fields that are accepted and change nothing."""

_PROMPT_SCHEMA: dict[str, Any] = {
    "description": "Text, token ids, or a list of either.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ],
}


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    NOT_BUILT: ClassVar[NEUTRAL] = {**_NOT_BUILT, "suffix": ("",)}

    # Looked at by `parse_prompts`: a list of a million ids would take long here.
    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    best_of: _NumChoices | None = None
    echo: bool = False
    logprobs: _NumLogprobs | None = None


class TextPart(_Wire):
    """A piece of a message."""

    NOT_BUILT: ClassVar[NEUTRAL] = {}

    type: Literal["text"]
    text: str


class ChatMessage(_Wire):
    """One turn. Answers of other servers carry more fields; where empty they are let through."""

    NOT_BUILT: ClassVar[NEUTRAL] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
    ]
    name: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as `LLM.chat` takes it too, without fields that were not given."""
        parts = [{"type": part.type, "text": part.text} for part in self.content]
        message = {
            "role": self.role,
            "content": parts[0]["text"] if len(parts) == 1 else parts,
            "name": self.name,
            "reasoning_content": self.reasoning_content,
        }
        return {name: value for name, value in message.items() if value is not None}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    NOT_BUILT: ClassVar[NEUTRAL] = {
        **_NOT_BUILT,
        "audio": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: _NumTokens | None = None
    logprobs: bool = False
    top_logprobs: _NumLogprobs | None = None
