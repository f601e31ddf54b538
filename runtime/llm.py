"""The Python face of an artifact: `LLM`, for scripts and notebooks."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload

from ..ir.artifact import Artifact, Verification
from ..ir.errors import InfcError, RequestError
from .opening import open_engine
from .outputs import RequestOutput, merge_outputs
from .progress_bar import ProgressBar
from .prompts import (
    Prompt,
    as_params,
    as_prompts,
    encode_conversation,
    is_one_conversation,
    one_of,
)
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat_template import Message
    from .prompts import TemplateOptions


class LLM:
    """Generates with an artifact. Not thread-safe; a context manager, or call `close`.

    Keyword arguments are the fields of `RuntimeOptions`: `max_context`, `max_sequences`,
    `step_tokens`, `kv_memory`, `threads`, ... What had to be decided otherwise, such as a shorter
    context because of little memory, is told to `on_note`, or is a warning.

    Raises ArtifactError, TargetError, CapacityError, and UsageError for a limit nobody knows.
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
        """The tokenizer; None for an artifact that takes and gives token ids only."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """One answer a prompt, in their order. `params` is for all, or one for each.

        `sampling_params` is another name for `params`. With `progress` a bar on stderr counts
        the answers, where that is a terminal.

        A prompt that can never be served raises RequestError, and the others are given up; its
        `where` says which one of a list it was.
        """
        self._check_open()
        batch = as_prompts(prompts)
        each = as_params(one_of(params, sampling_params), len(batch))
        names: list[str] = []
        answers: dict[str, list[RequestOutput]] = {}
        left: list[str] = []
        try:
            with ProgressBar("generate", len(batch), on=progress) as bar:
                while left or len(names) < len(batch):
                    fresh = self._feed(batch, each, len(names))
                    names += fresh
                    answers.update((name, []) for name in fresh)
                    self._step()
                    before = [*left, *fresh]
                    left = [name for name in before if not self._collect(name, answers[name])]
                    bar.advance(len(before) - len(left))
        finally:
            self._drop(names)
        return [merge_outputs(answers[name]) for name in names]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[RequestOutput]:
        """What each step adds to the answer. Closing the iterator ends the request.

        The request begins, and is refused if it must be, when the iterator is first asked.
        """
        name = self._add(prompt, one_of(params, sampling_params))
        parts: list[RequestOutput] = []
        try:
            while not self._collect(name, parts):
                yield from parts
                parts.clear()
                if self._parts[name]:
                    continue  # it came while the caller was asking another iterator
                self._check_open()
                if self.engine.scheduler.get(name) is None:
                    raise InfcError("the engine gave this request up after an error")
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
        """The answer to a conversation of `{"role": ..., "content": ...}` messages.

        A list of conversations gives a list of answers, in their order. `template` are the
        keywords of `TemplateOptions`. RequestError where the artifact has no chat template.
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
        """What each step adds to the answer of one conversation; `template` as for `chat`."""
        self._check_open()
        ids = encode_conversation(self.tokenizer, messages, **template)
        return self.stream(ids, one_of(params, sampling_params))

    def close(self) -> None:
        """Give threads and memory back, and end open streams; a second call does nothing."""
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

    def _add(self, prompt: Prompt, params: SamplingParams | None) -> str:
        self._check_open()
        name = str(next(self._ids))
        self.engine.add_request(name, prompt, params)
        self._parts[name] = deque()
        return name

    def _feed(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None], begin: int
    ) -> list[str]:
        """Queue prompts from `begin` on, as far as the queue takes them; the names they got."""
        scheduler = self.engine.scheduler
        # Whoever was preempted waits too, and may do so beyond the limit.
        room = max(0, scheduler.limits.max_waiting - scheduler.num_waiting)
        names: list[str] = []
        try:
            for index in range(begin, min(begin + room, len(prompts))):
                names.append(self._add(prompts[index], params[index]))
        except BaseException as error:
            self._drop(names)
            if isinstance(error, RequestError) and len(prompts) > 1:
                error.where = f"prompts[{begin + len(names)}]"
            raise
        return names

    def _step(self) -> None:
        for output in self.engine.step():
            self._parts[output.request_id].append(output)

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
