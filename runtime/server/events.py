"""A stream of answers as server-sent events."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..requests.outputs import CompletionOutput, RequestOutput
from .encoding import TextFrame, encode, encode_in_pieces
from .jobs import SMALL, Job, width_of

if TYPE_CHECKING:
    from .generation import Outputs
    from .service import Service
    from .usage import Usage

_MOST_AT_ONCE = 64  # outputs that are written before others have their turn


class Events:
    """The events of one request, in pieces of bytes; whoever gets them closes it."""

    def __init__(
        self, service: Service, outputs: Outputs, head: dict[str, Any], job: Job, usage: Usage
    ) -> None:
        self._service = service
        self._outputs = outputs
        self._head = head
        self._chunk = {**head, "usage": None} if job.request.include_usage else head
        self._job = job
        self._usage: Usage | None = usage if job.request.include_usage else None
        self._width = width_of(job)
        self._echoes: bool = getattr(job.request, "echo", False)  # token ids are decoded then
        self._begun: set[int] = set()
        # Most events of most streams differ in their text alone.
        self._has_frames = job.params.logprobs is None and not job.shape.with_ids
        self._frames: dict[int, TextFrame] = {}
        self._failure: Exception | None = None
        self._write_now: Callable[[bytes], bool]

    def close(self) -> None:
        """End what is still being generated."""
        self._outputs.close()

    def write_at_once(self, write: Callable[[bytes], bool]) -> None:
        """While `get` waits, give plain events to `write`, which says whether it took them.

        That takes a small part of the time that a task needs to wake up, and to send. For several
        prompts, tasks that send what has come of all of them are better.
        """
        if self._has_frames and len(self._job.prompts) == 1:
            self._write_now = write
            self._outputs.divert(self._take)

    def _take(self, number: int, output: RequestOutput) -> bool:
        data = b""
        for part in output.outputs:
            frame = self._frames.get(part.index)
            if frame is None or part.finish_reason is not None or len(part.token_ids) > SMALL:
                return False
            if part.text:
                data += frame.filled(part.text)
        return not data or self._write_now(data)

    async def get(self) -> list[bytes]:
        """The next events, all that there are by then; nothing at the end.

        Raises what `Outputs.get` raises.
        """
        if self._failure is not None:
            raise self._failure
        outputs, pieces = self._outputs, list[bytes]()
        count = 0
        while outputs.num_open:
            # An output without an event is not the end, however many there are of them.
            if pieces and (count >= _MOST_AT_ONCE or not outputs.has_more):
                break
            count += 1
            try:
                number, output = await outputs.get()
                pieces += await self._events(number, output)
            except Exception as error:
                if not pieces:
                    raise
                self._failure = error  # told behind what came before it
                break
        if not pieces and not outputs.num_open and self._usage is not None:
            last = {**self._head, "choices": [], "usage": self._usage.as_json()}
            self._usage = None
            return framed([encode(last)])
        return pieces

    async def _events(self, number: int, output: RequestOutput) -> list[bytes]:
        pieces = []
        for part in output.outputs:
            index = number * self._job.params.n + part.index
            if index not in self._begun:
                self._begun.add(index)
                num_rows = len(output.prompt_logprobs or ())
                if self._echoes:
                    num_rows = len(output.prompt_token_ids)
                opening = partial(self._job.shape.opening, index, output)
                pieces += await self._write(opening, num_rows, opens=True)
            if self._has_frames and part.finish_reason is None and len(part.token_ids) <= SMALL:
                if part.text:
                    pieces.append(self._frame(index).filled(part.text))
            else:
                chunk = partial(self._job.shape.chunk, index, part)
                pieces += await self._write(chunk, len(part.token_ids))
        return pieces

    def _frame(self, index: int) -> TextFrame:
        """What surrounds a text that is all that a step added to a choice."""
        if (frame := self._frames.get(index)) is None:

            def event(text: str) -> list[bytes]:
                part = CompletionOutput(index=index, text=text)
                choice = self._job.shape.chunk(index, part)
                return framed([encode({**self._chunk, "choices": [choice]})])

            frame = self._frames[index] = TextFrame(event)
        return frame

    async def _write(
        self, choose: Callable[[], dict[str, Any] | None], num_tokens: int, *, opens: bool = False
    ) -> list[bytes]:
        """An event with what `choose` gives, made beside the event loop where that takes long."""

        def pieces() -> list[bytes]:
            if (choice := choose()) is None:
                return []
            if long or (opens and self._job.params.prompt_logprobs is not None):
                return framed(encode_in_pieces(self._chunk, [choice]))
            return framed([encode({**self._chunk, "choices": [choice]})])

        long = num_tokens * self._width > SMALL
        return await self._service.writers.run(pieces) if long else pieces()


def framed(event: list[bytes]) -> list[bytes]:
    """An event of JSON in pieces, as it is sent."""
    return [b"data: ", *event, b"\n\n"]
