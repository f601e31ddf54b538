"""What the routes share: the engine, the tokenizer, the settings, and checks made at the door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...ir.errors import RequestError
from ..text.text_decoders import REPLACEMENT
from .errors import ApiError
from .logprobs import TokenNames
from .metrics import ServerMetrics
from .protocol import GenerationRequest
from .served import ServedEngine
from .settings import ServerSettings
from .workers import Workers

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_SMALL = 4096  # characters, or token ids, that are looked at in no time
_PLAUSIBLE = 16  # characters a token; a text beyond that may deserve a closer look


class Service:
    """One served model."""

    def __init__(
        self,
        engine: ServedEngine,
        tokenizer: Tokenizer | None,
        settings: ServerSettings,
        metrics: ServerMetrics,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.metrics = metrics
        self.token_texts = TokenNames(tokenizer)
        self.workers = Workers(settings.max_queue)
        # What is generated already is never refused, nor waits behind what is being prepared.
        self.writers = Workers(None)
        self._longest_token: int | None = None

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.max_context

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that one prompt may have; the whole context where no answer is wanted."""
        limit = self.settings.max_prompt_tokens
        return self.max_context if limit is None else min(self.max_context, limit)

    def check_model(self, name: str) -> None:
        """Raises ApiError unless the model is served here by that name."""
        names = self.settings.model_names
        if name not in names:
            raise ApiError(
                404,
                f"unknown model {name[:100]!r}; this server has {', '.join(map(repr, names))}",
                param="model",
                code="model_not_found",
            )

    def check_request(self, request: GenerationRequest, num_logprobs: int | None) -> None:
        """Raises ApiError for another model, and for more than the settings allow."""
        self.check_model(request.model)
        settings = self.settings
        for field, count, most in (
            ("stop", len(request.stop), settings.max_stop_strings),
            ("logprobs", num_logprobs or 0, settings.max_logprobs),
            ("prompt_logprobs", request.prompt_logprobs or 0, settings.max_logprobs),
        ):
            if count > most:
                raise RequestError(
                    f"{field}: {count} exceeds the limit of this server, {most}",
                    field=field,
                )

    def output_limit(self, wanted: int | None, field: str) -> int | None:
        """Tokens that a completion may have, where `wanted` are asked for; None is no limit."""
        limit = self.settings.max_output_tokens
        if limit is not None and wanted is not None and wanted > limit:
            raise RequestError(f"{field} is {wanted}, the limit is {limit}", field=field)
        return limit if wanted is None else wanted

    def check_length(self, prompt: str | list[int], field: str) -> None:
        """Refuses what is too long however well it packs, before work is spent on it."""
        if not isinstance(prompt, str):
            self.check_tokens(len(prompt), field)
            return
        if len(prompt) <= self.max_context * _PLAUSIBLE:
            return
        if (most := self.max_characters) is not None and len(prompt) > most:
            raise RequestError(
                f"the prompt has {len(prompt)} characters, but the context of {self.max_context}"
                f" tokens can hold at most {most}",
                field=field,
            )

    @property
    def max_characters(self) -> int | None:
        """Characters that the context holds, however well they pack; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        if self._longest_token is None:
            vocabulary = self.tokenizer.backend.get_vocab(with_added_tokens=True)
            self._longest_token = max(map(len, vocabulary))
        return self.max_context * self._longest_token

    def check_tokens(self, count: int, field: str) -> None:
        """Refuses a prompt of too many tokens; whether its answer fits is the engine's to say."""
        if count > self.max_context:
            raise RequestError(
                f"the prompt has {count} tokens, the limit for prompt and answer together is"
                f" {self.max_context}",
                field=field,
            )
        if count > self.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {count} tokens, the limit is {self.max_prompt_tokens}",
                field=field,
            )

    async def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """The tokens of prompts, counted; long ones never hold up the others."""
        encode = self.engine.encode
        if sum(map(len, prompts)) > _SMALL:
            token_ids = await self.workers.run(lambda: [encode(prompt) for prompt in prompts])
        else:
            token_ids = [encode(prompt) for prompt in prompts]
        for ids in token_ids:
            self.check_tokens(len(ids), "prompt")
        return token_ids

    def text_of(self, token_ids: list[int]) -> str:
        """The text of a prompt that came as token ids; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        # An unfinished character at the end belongs to the answer.
        return text if text[-1:] != REPLACEMENT else "".join(self.tokenizer.text_parts(token_ids))

    def wants_token_ids(self, request: GenerationRequest) -> bool:
        """Whether choices carry `token_ids`: where asked for, and where nothing else tells."""
        wanted = request.return_token_ids
        return self.tokenizer is None if wanted is None else wanted

    async def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation; it never holds up the others."""
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer",
                field="messages",
                hint="send token ids to /v1/completions",
            )
        # Of templates nobody knows how long they take, and the first one compiles its own.
        token_ids = await self.workers.run(self._encode_chat, self.tokenizer, messages)
        self.check_tokens(len(token_ids), "messages")
        return token_ids

    def _encode_chat(self, tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
        token_ids = tokenizer.encode_chat(messages, max_characters=self.max_characters)
        return self.engine.encode(token_ids)
