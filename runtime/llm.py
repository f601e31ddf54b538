"""The Python face of an artifact: `LLM`, for scripts and notebooks."""

from __future__ import annotations

import difflib
import itertools
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..ir.artifact import Artifact, Verification
from ..ir.errors import InfcError, RequestError, UsageError
from .engine import Engine
from .limits import RuntimeOptions
from .outputs import RequestOutput, merge_outputs
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .chat_template import Message

Prompt = str | Sequence[int]


class LLM:
    """Generates with an artifact. Not thread-safe; a context manager, or call `close`.

    Keyword arguments are the fields of `RuntimeOptions`: `max_context`, `max_sequences`,
    `step_tokens`, `kv_memory`, `threads`, ... Raises ArtifactError, TargetError, CapacityError.
    """

    def __init__(
        self,
        artifact: Artifact | str | os.PathLike[str],
        *,
        verify: Verification = "stamp",
        **limits: Any,
    ) -> None:
        self._closed = False
        self.engine = Engine.open(artifact, _as_options(limits), verify=verify)
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
        progress: bool = False,
    ) -> list[RequestOutput]:
        """One answer a prompt, in their order. `params` is for all, or one for each.

        A prompt that can never be served raises RequestError, and the others are given up; its
        `where` says which one of a list it was.
        """
        self._check_open()
        batch = _as_prompts(prompts)
        each = _as_params(params, len(batch))
        names: list[str] = []
        answers: dict[str, list[RequestOutput]] = {}
        left: list[str] = []
        try:
            with _ProgressBar(len(batch) if progress else None) as bar:
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
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """What each step adds to the answer. Closing the iterator ends the request.

        The request begins, and is refused if it must be, when the iterator is first asked.
        """
        name = self._add(prompt, params)
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

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> RequestOutput:
        """The answer to a conversation of `{"role": ..., "content": ...}` messages."""
        return merge_outputs(
            list(
                self.stream_chat(
                    messages, params, tools=tools, template_variables=template_variables
                )
            )
        )

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:
        """What each step adds to the answer of a conversation."""
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer", field="messages")
        ids = self.tokenizer.encode_chat(messages, tools=tools, variables=template_variables)
        return self.stream(ids, params)

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


class _ProgressBar:
    """A bar of finished requests on stderr; nothing where the total is None."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _ProgressBar:
        if self._total is not None:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True))
            self._progress.start()
            self._task = self._progress.add_task("generate", total=self._total)
        return self

    def advance(self, count: int) -> None:
        """So many requests have ended."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def _as_options(limits: Mapping[str, Any]) -> RuntimeOptions:
    known = [field.name for field in fields(RuntimeOptions)]
    if wrong := [name for name in limits if name not in known]:
        near = difflib.get_close_matches(wrong[0], known, 1)
        names = f"it takes verify, {', '.join(known)}"
        raise UsageError(
            f"infc.LLM takes no {wrong[0]!r}",
            hint=f"did you mean {near[0]!r}? {names}" if near else names,
        )
    return RuntimeOptions(**limits)


def _as_params(params: Any, count: int) -> list[Any]:
    """The parameters of each of `count` prompts; the engine checks what they are."""
    if not isinstance(params, Sequence) or isinstance(params, (str, bytes)):
        return [params] * count
    if len(params) != count:
        raise RequestError(
            f"{len(params)} params do not go with {count} prompts",
            field="params",
            hint="give one for all, or one for each",
        )
    return list(params)


def _as_prompts(prompts: Any) -> list[Prompt]:
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
                f"{item!r:.80} is no prompt", field="prompt", where=f"prompts[{index}]"
            )
    return list(prompts)
