"""The Python face of an artifact: `LLM`, for scripts and notebooks."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload

from ...ir.artifact import Artifact, Verification
from ...ir.errors import InfcError, RequestError
from ..requests.outputs import RequestOutput, merge_outputs
from ..requests.pooling import Pooling
from ..sampling.sampling_params import SamplingParams
from ..text.tokenizer import Tokenizer
from .opening import Unpicklable, open_engine
from .progress_bar import ProgressBar
from .prompts import (
    Prompt,
    as_params,
    as_prompts,
    encode_conversation,
    is_one_conversation,
    one_of,
)
from .reading import Embedding, Score, as_embedding, as_score, as_scored

if TYPE_CHECKING:
    from ..text.chat_messages import Message
    from .prompts import TemplateOptions

_Add = Callable[[str], None]
"""Queues a request under the name that it is given."""


class LLM(Unpicklable):
    """Generates text with an artifact. Not thread-safe; a context manager, or call `close`.

    Keyword arguments are the fields of `RuntimeOptions`: `max_context`, `max_sequences`,
    `step_tokens`, `kv_memory`, `threads`, ... A setting that had to be changed, such as a shorter
    context because of little memory, is reported to `on_note`, or as a warning.

    Raises ArtifactError, TargetError, CapacityError, and UsageError for an unknown option.
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
        self.engine = open_engine(artifact, verify, on_note, limits)
        self._ids = itertools.count()
        self._parts: dict[str, deque[RequestOutput]] = {}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if the artifact only accepts and returns token ids."""
        return self.engine.tokenizer

    def recommended_params(self, **given: Any) -> SamplingParams:
        """The recommendations in generation_config.json; `given` takes precedence."""
        return self.engine.recommended_params(**given)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Returns one answer per prompt, in the same order.

        `params` applies to all prompts, or is a list with one entry per prompt; `sampling_params`
        is an alias. `progress` shows a progress bar on stderr if that is a terminal.

        If a prompt can never be served, the call raises RequestError and all prompts are
        cancelled. For a list, `where` names the prompt.
        """
        self._check_open()
        batch = as_prompts(prompts)
        each = as_params(one_of(params, sampling_params), len(batch))
        adds = [
            partial(self.engine.add_request, prompt=prompt, params=one, whole=True)
            for prompt, one in zip(batch, each, strict=True)
        ]
        return self._run(adds, ProgressBar("generate", len(adds), on=progress))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[RequestOutput]:
        """Yields what each step adds to the answer. Closing the iterator cancels the request.

        The request starts, or is rejected, when the first element is requested.
        """
        chosen = one_of(params, sampling_params)
        name = self._add(partial(self.engine.add_request, prompt=prompt, params=chosen))
        parts: list[RequestOutput] = []
        try:
            while not self._collect(name, parts):
                yield from parts
                parts.clear()
                if self._parts[name]:
                    continue  # it came while the caller was asking another iterator
                self._check_open()
                if self.engine.scheduler.get(name) is None:
                    raise InfcError("the engine cancelled this request after an error")
                self._step()
            yield from parts
        finally:
            self._drop([name])

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        progress: bool = False,
        **template: Unpack[TemplateOptions],
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
        **template: Unpack[TemplateOptions],
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
        **template: Unpack[TemplateOptions],
    ) -> RequestOutput | list[RequestOutput]:
        """Returns the answer to a conversation of `{"role": ..., "content": ...}` messages.

        For a list of conversations, it returns a list of answers in the same order. `template` are
        the keywords of `TemplateOptions`. Raises RequestError without a chat template.
        """
        self._check_open()
        one = is_one_conversation(messages)
        chats: Sequence[Any] = [messages] if one else messages
        prompts = [encode_conversation(self.tokenizer, chat, **template) for chat in chats]
        answers = self.generate(prompts, one_of(params, sampling_params), progress=progress)
        return answers[0] if one else answers

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        **template: Unpack[TemplateOptions],
    ) -> Iterator[RequestOutput]:
        """Yields what each step adds to the answer; `template` as in `chat`."""
        self._check_open()
        ids = encode_conversation(self.tokenizer, messages, **template)
        return self.stream(ids, one_of(params, sampling_params))

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt] | None = None,
        *,
        progress: bool = False,
    ) -> list[Score]:
        """Log-probabilities of the tokens of given texts; nothing is generated.

        Without `continuations`, every token of a prompt except the first is scored. Otherwise, only
        the continuations are scored: one per prompt, or many for a single prompt, which is computed
        once. Raises RequestError as `generate` does, and if there is nothing to score.
        """
        self._check_open()
        adds = [
            partial(self.engine.read_prompt, prompt=each.token_ids, first_scored=each.first_scored)
            for each in as_scored(self.engine, prompts, continuations)
        ]
        answers = self._run(adds, ProgressBar("score", len(adds), on=progress))
        return [as_score(answer) for answer in answers]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        progress: bool = False,
    ) -> list[Embedding]:
        """Returns a vector per prompt, from the hidden states that are the input of the head.

        `pooling` selects the last token, or the mean over all tokens. `normalize` scales the
        vector to Euclidean length 1. Raises RequestError as `generate` does, and if the artifact
        does not provide hidden states.
        """
        self._check_open()
        adds = [
            partial(self.engine.read_prompt, prompt=prompt, pooling=pooling)
            for prompt in as_prompts(prompts)
        ]
        answers = self._run(adds, ProgressBar("embed", len(adds), on=progress))
        return [as_embedding(answer, normalize=normalize) for answer in answers]

    def close(self) -> None:
        """Releases threads and memory and ends open streams; can be called again."""
        self._closed = True
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise InfcError(
                "this LLM is closed", hint="read answers and streams before the `with` block ends"
            )

    def _add(self, add: _Add) -> str:
        self._check_open()
        name = str(next(self._ids))
        add(name)
        self._parts[name] = deque()
        return name

    def _run(self, adds: Sequence[_Add], bar: ProgressBar) -> list[RequestOutput]:
        """The whole answers to requests, in their order."""
        names: list[str] = []
        answers: dict[str, list[RequestOutput]] = {}
        left: list[str] = []
        try:
            with bar:
                while left or len(names) < len(adds):
                    fresh = self._feed(adds, len(names))
                    names += fresh
                    answers.update((name, []) for name in fresh)
                    left += fresh
                    if self._step():
                        before = left
                        left = [name for name in before if not self._collect(name, answers[name])]
                        bar.advance(len(before) - len(left))
        finally:
            self._drop(names)
        return [merge_outputs(answers[name]) for name in names]

    def _feed(self, adds: Sequence[_Add], begin: int) -> list[str]:
        """Queue requests from `begin` on, as far as the queue takes them; the names they got."""
        scheduler = self.engine.scheduler
        # Whoever was preempted waits too, and may do so beyond the limit.
        room = max(0, scheduler.limits.max_waiting - scheduler.num_waiting)
        names: list[str] = []
        try:
            for index in range(begin, min(begin + room, len(adds))):
                names.append(self._add(adds[index]))
        except BaseException as error:
            self._drop(names)
            if isinstance(error, RequestError) and len(adds) > 1:
                error.where = f"prompts[{begin + len(names)}]"
            raise
        return names

    def _step(self) -> bool:
        """Make a step; whether it had anything to tell."""
        outputs = self.engine.step()
        for output in outputs:
            self._parts[output.request_id].append(output)
        return len(outputs) > 0

    def _collect(self, name: str, parts: list[RequestOutput]) -> bool:
        """Move what came for a request to `parts`; whether it has ended."""
        waiting = self._parts[name]
        parts.extend(waiting)
        waiting.clear()
        if parts and parts[-1].finished:
            del self._parts[name]
            return True
        return False

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            if self._parts.pop(name, None) is not None:
                self.engine.abort(name)
