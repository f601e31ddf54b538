"""The wire: requests as OpenAI's API writes them, strict, and apart from the engine's types."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..sampling_params import SamplingParams

HARMLESS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "store", "user"})
"""Fields that are accepted and change nothing here: they are for whoever keeps the books."""

MAX_MESSAGES = 4096

_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
}


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

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    if not isinstance(value, (str, list)):
        raise ValueError("must be a string or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_Temperature = Annotated[float, Field(ge=0, le=100)]


class GenerationRequest(_Wire):
    """The fields that completions and chats share; None takes the server's default."""

    NOT_BUILT: ClassVar[dict[str, tuple[Any, ...]]] = _NOT_BUILT
    """Fields that are refused by name unless they say what happens anyway."""

    model: str
    temperature: _Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=256)] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of the stream counts the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(
        self, defaults: dict[str, Any], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """The engine's parameters. Raises RequestError for a value out of range."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            **{**defaults, **chosen},
            seed=self.seed,
            max_tokens=max_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `prompt` is text, token ids, or a list of either."""

    NOT_BUILT: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NOT_BUILT,
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Any
    logprobs: int | None = None


class TextPart(_Wire):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Wire):
    """One turn. Answers of other servers carry more fields; where empty they are let through."""

    NOT_BUILT: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]
    name: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it: text, and no field that was not given."""
        # Templates know no developer: it is what newer models call the system.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "".join(part.text for part in self.content)}
        extra = {"name": self.name, "reasoning_content": self.reasoning_content}
        return message | {name: value for name, value in extra.items() if value is not None}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    NOT_BUILT: ClassVar[dict[str, tuple[Any, ...]]] = {
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
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
