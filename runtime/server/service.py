"""What the routes share: the engine, the tokenizer, the settings, and checks made at the door."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ...ir.errors import RequestError
from .errors import ApiError
from .logprobs import TokenTexts
from .protocol import GenerationRequest
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine
    from ..tokenizer import Tokenizer

_SMALL = 4096  # characters that are tokenized in no time
_PLAUSIBLE = 16  # characters a token; a text beyond that may deserve a closer look


class Service:
    """One served model."""

    def __init__(
        self, engine: AsyncEngine, tokenizer: Tokenizer | None, settings: ServerSettings
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.token_texts = TokenTexts(tokenizer)
        self._longest_token: int | None = None

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.engine.plan.limits.max_context

    def check_model(self, name: str) -> None:
        """Raises ApiError unless `name` is the model served here."""
        if name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here, {self.settings.model_name!r} is",
                param="model",
                code="model_not_found",
            )

    def check_length(self, prompt: str | list[int], field: str) -> None:
        """Refuses what is too long however well it packs, before work is spent on it."""
        if not isinstance(prompt, str):
            if len(prompt) >= self.max_context:
                raise RequestError(
                    f"the prompt has {len(prompt)} tokens, and {self.max_context} are all that"
                    " prompt and answer may have",
                    field=field,
                )
            return
        if self.tokenizer is None or len(prompt) <= self.max_context * _PLAUSIBLE:
            return
        if self._longest_token is None:
            vocabulary = self.tokenizer.backend.get_vocab(with_added_tokens=True)
            self._longest_token = max(map(len, vocabulary))
        most = self.max_context * self._longest_token
        if len(prompt) > most:
            raise RequestError(
                f"the prompt has {len(prompt)} characters, and the context of {self.max_context}"
                f" tokens holds at most {most}",
                field=field,
            )

    def wants_token_ids(self, request: GenerationRequest) -> bool:
        """Whether choices carry `token_ids`: where asked for, and where nothing else tells."""
        wanted = request.return_token_ids
        return self.tokenizer is None if wanted is None else wanted

    async def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation; a long one never holds up the others."""
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer",
                field="messages",
                hint="send token ids to /v1/completions",
            )
        text = self.tokenizer.render_chat(messages)
        self.check_length(text, "messages")
        if len(text) <= _SMALL:
            return self.tokenizer.encode(text, add_special_tokens=False)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=False)
