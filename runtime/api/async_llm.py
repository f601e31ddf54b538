"""The Python face of an artifact for asyncio: `AsyncLLM`, many callers over one engine."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from ...ir.artifact import Artifact, Verification
from ...ir.errors import InfcError
from ..async_engine import AsyncEngine
from ..engine import EngineStats
from ..requests.outputs import RequestOutput, merge_outputs
from ..requests.pooling import Pooling
from ..sampling.sampling_params import SamplingParams
from ..text.tokenizer import Tokenizer
from .opening import Unpicklable, open_engine
from .prompts import Prompt, encode_conversation, one_of
from .reading import Embedding, Score, as_embedding, as_score, scored_prompt

if TYPE_CHECKING:
    from ..text.chat_messages import Message
    from .prompts import TemplateOptions


class AsyncLLM(Unpicklable):
    """Serves many tasks with an artifact; an async context manager, or await `close`.

    The engine runs in its own thread, regardless of the number of callers and event loops.
    The arguments are the same as for `LLM`. The artifact is opened on the calling thread.
    """

    def __init__(
        self,
        artifact: Artifact | str | os.PathLike[str],
        *,
        verify: Verification = "stamp",
        on_note: Callable[[str], None] | None = None,
        **limits: Any,
    ) -> None:
        self._closed = False
        self.engine = AsyncEngine(open_engine(artifact, verify, on_note, limits))
        # Also where nobody closes: the thread would keep the engine for ever.
        weakref.finalize(self, self.engine.stop).atexit = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if the artifact only accepts and returns token ids."""
        return self.engine.engine.tokenizer

    def recommended_params(self, **given: Any) -> SamplingParams:
        """The recommendations in generation_config.json; `given` takes precedence."""
        return self.engine.engine.recommended_params(**given)

    def stats(self) -> EngineStats:
        """The current numbers of requests, blocks and steps."""
        return self.engine.stats()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        cumulative: bool = False,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields what each step adds to the answer, or with `cumulative` the answer so far.

        The last output has a finish reason. Closing or cancelling the iterator cancels the request
        (after a `break`, `contextlib.aclosing` does so immediately). A slow reader receives several
        tokens in one output. Requests with a smaller `priority` are scheduled first. Prefixes are
        only shared between requests with the same `cache_salt`.

        Raises RequestError and CapacityError before the first output, and InfcError if the engine
        stops.
        """
        self._check_open()
        chosen = one_of(params, sampling_params)
        outputs = self.engine.generate(prompt, chosen, priority=priority, cache_salt=cache_salt)
        whole: RequestOutput | None = None
        async with aclosing(outputs):
            async for part in outputs:
                output = part
                if cumulative:
                    output = whole = part if whole is None else merge_outputs([whole, part])
                yield output

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        cumulative: bool = False,
        priority: int = 0,
        cache_salt: str = "",
        **template: Unpack[TemplateOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same as `generate` for a conversation, with the keywords of TemplateOptions."""
        self._check_open()
        ids = await asyncio.to_thread(encode_conversation, self.tokenizer, messages, **template)
        outputs = self.generate(
            ids,
            one_of(params, sampling_params),
            cumulative=cumulative,
            priority=priority,
            cache_salt=cache_salt,
        )
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    async def score(
        self,
        prompt: Prompt,
        continuation: Prompt | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Score:
        """Log-probabilities of a text; see `LLM.score`. Concurrent calls are batched.

        `priority` and `cache_salt` are the same as in `generate`.
        """
        self._check_open()
        each = await asyncio.to_thread(scored_prompt, self.engine.engine, prompt, continuation)
        answer = await self.engine.read_prompt(
            each.token_ids,
            first_scored=each.first_scored,
            priority=priority,
            cache_salt=cache_salt,
        )
        return as_score(answer)

    async def embed(
        self,
        prompt: Prompt,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Embedding:
        """The vector of a prompt; see `LLM.embed`. Concurrent calls are batched.

        `priority` and `cache_salt` are the same as in `generate`.
        """
        self._check_open()
        answer = await self.engine.read_prompt(
            prompt, pooling=pooling, priority=priority, cache_salt=cache_salt
        )
        return as_embedding(answer, normalize=normalize)

    async def drain(self, timeout_seconds: float | None = None) -> bool:
        """Stops accepting requests and waits for open ones; returns whether all finished."""
        return await self.engine.drain(timeout_seconds)

    async def close(self) -> None:
        """Cancels open requests, stops the thread and frees memory; can be called again."""
        if not self._closed:
            self._closed = True
            self.engine.stop()
            try:
                await asyncio.to_thread(self.engine.shutdown)
            except (RuntimeError, MemoryError):  # no more threads can be had
                self.engine.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InfcError("this AsyncLLM is closed", hint="use it inside the `async with` block")
