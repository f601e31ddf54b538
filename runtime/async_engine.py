"""The engine for many callers at once: one thread owns it, asyncio streams come out of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from ..ir.errors import DrainingError, InfcError
from .engine import Engine, EngineStats
from .outputs import RequestOutput, merge_outputs
from .pooling import Pooling
from .sampling_params import SamplingParams

_Item = RequestOutput | InfcError

MAX_UNREAD = 64
"""Outputs that a slow reader may leave lying; what comes beyond them is joined to the last."""

_IDLE_SECONDS = 0.005
"""How long a request may wait for work that is done while there is nothing to do."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One caller: its request, and its outputs that nobody has read yet."""

    request_id: str
    queue: Callable[[str], None]
    loop: asyncio.AbstractEventLoop
    unread: deque[_Item] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: _Item) -> None:
        """Take an output in; on the loop's thread."""
        last = self.unread[-1] if len(self.unread) >= MAX_UNREAD else None
        if isinstance(last, RequestOutput) and isinstance(item, RequestOutput):
            self.unread[-1] = merge_outputs([last, item])
        else:
            self.unread.append(item)
        self.arrived.set()

    async def get(self) -> _Item:
        """The next output, as soon as there is one."""
        while not self.unread:
            self.arrived.clear()
            await self.arrived.wait()
        return self.unread.popleft()


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    stream: _Stream | None = None


_Command = _Stream | _Abort | None  # None wakes the thread up


class AsyncEngine:
    """Runs an engine on a thread of its own; commands go in by one queue, outputs out by another.

    The thread starts with the object. Should it die, `healthy` turns false, and every pending and
    later request fails with the reason: nobody waits for ever.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()  # guards _num_pending, _draining, _error against the thread
        self._num_pending = 0
        self._draining = False
        self._stopping = False
        self._error: BaseException | None = None
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, name="infc-engine", daemon=True)
        self._thread.start()

    # --- for callers --------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread lives."""
        return self._error is None and not self._stopping

    @property
    def error(self) -> BaseException | None:
        """What the engine's thread died of."""
        return self._error

    @property
    def num_pending(self) -> int:
        """Requests that were taken and have not ended."""
        return self._num_pending

    def stats(self) -> EngineStats:
        """Counts of about now."""
        return self.engine.stats()

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """What each step adds to the request, the last one with its finish reason.

        Closing or cancelling the iterator ends the request. What a slow reader leaves unread is
        joined together, so that it is bounded by the length of the answer. Raises RequestError
        and CapacityError (DrainingError after `drain`) before the first output, InfcError when
        the engine stops.
        """
        # Tokenization is done here: it may take long, and the engine's thread never waits for it.
        token_ids = await self._encode(prompt)
        queue = partial(
            self.engine.add_request,
            prompt=token_ids,
            params=params,
            priority=priority,
            cache_salt=cache_salt,
        )
        async with aclosing(self._outputs(queue, request_id)) as outputs:
            async for output in outputs:
                yield output

    async def read_prompt(
        self,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling | None = None,
        first_scored: int = 1,
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestOutput:
        """The embedding or the log-probabilities of a prompt, as `Engine.read_prompt` has them.

        Cancelling the call ends the request; it raises what `generate` raises.
        """
        queue = partial(
            self.engine.read_prompt,
            prompt=await self._encode(prompt),
            pooling=pooling,
            first_scored=first_scored,
            priority=priority,
            cache_salt=cache_salt,
        )
        async with aclosing(self._outputs(queue, None)) as outputs:
            return merge_outputs([output async for output in outputs])

    async def _outputs(
        self, queue: Callable[[str], None], request_id: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """What each step adds to the request that `queue` adds to the engine."""
        stream = _Stream(
            request_id=request_id if request_id is not None else f"infc-{next(self._ids)}",
            queue=queue,
            loop=asyncio.get_running_loop(),
        )
        self._submit(stream)
        finished = False
        try:
            while not finished:
                item = await stream.get()
                finished = isinstance(item, InfcError) or item.finished
                if isinstance(item, InfcError):
                    raise item
                yield item
        finally:
            if not finished:
                self._commands.put(_Abort(stream.request_id, stream))

    def abort(self, request_id: str) -> None:
        """End a request soon; its iterator gets a last output with finish reason "abort"."""
        self._commands.put(_Abort(request_id))

    async def drain(self, timeout_seconds: float | None = None) -> bool:
        """Take no more requests, wait for those there are; whether all of them ended in time."""
        with self._lock:
            self._draining = True
        loop = asyncio.get_running_loop()
        deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        while self._num_pending and self._thread.is_alive():
            if deadline is not None and loop.time() >= deadline:
                return False
            await asyncio.sleep(0.01)
        return self._num_pending == 0

    def stop(self) -> None:
        """Let the thread end after its current step, and fail what is pending; returns at once.

        It takes no lock, so that a garbage collector may call it anywhere.
        """
        self._stopping = True
        self._commands.put(None)

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Stop the thread after its current step, fail what is pending, and close the engine."""
        with self._lock:
            self._draining = True
        self.stop()
        self._thread.join(timeout_seconds)
        if not self._thread.is_alive():
            self.engine.close()

    # --- inside -------------------------------------------------------------------------------

    async def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str) and len(prompt) > 4096:
            return await asyncio.to_thread(self.engine.encode, prompt)
        return self.engine.encode(prompt)

    def _submit(self, stream: _Stream) -> None:
        with self._lock:
            if self._error is not None:
                raise _stopped(self._error)
            if self._draining:
                raise DrainingError("no more requests are taken: shutting down")
            self._num_pending += 1
            self._commands.put(stream)

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while not self._stopping:
                self._take_commands()
                self._send([(out.request_id, out) for out in self.engine.step()])
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._die(error)
        else:
            self._die(None)

    def _take_commands(self) -> None:
        """Obey what is in the queue; with nothing else to do, wait for it."""
        wait = not self.engine.has_unfinished
        while wait and self._commands.empty() and self.engine.work_ahead(_IDLE_SECONDS):
            pass
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(command, _Stream):
                self._add(command)
            elif isinstance(command, _Abort):
                self._abort(command)

    def _add(self, stream: _Stream) -> None:
        try:
            stream.queue(stream.request_id)
        except Exception as error:  # of this request alone, its neighbours never notice
            refused = error if isinstance(error, InfcError) else _stopped(error)
            self._put([(stream, refused)])
            self._ended(1)
        else:
            self._streams[stream.request_id] = stream

    def _abort(self, command: _Abort) -> None:
        stream = self._streams.get(command.request_id)
        if stream is None or command.stream not in (None, stream):
            return  # it has ended; or its id belongs to somebody else by now
        output = self.engine.abort(command.request_id)
        if output is not None:
            self._send([(command.request_id, output)])

    def _send(self, outputs: list[tuple[str, RequestOutput]]) -> None:
        """Hand outputs to their streams, and forget those that ended."""
        if not outputs:
            return
        self._put([(self._streams[name], output) for name, output in outputs])
        ended = [name for name, output in outputs if output.finished]
        for name in ended:
            del self._streams[name]
        self._ended(len(ended))

    def _ended(self, count: int) -> None:
        with self._lock:
            self._num_pending -= count

    @staticmethod
    def _put(items: Sequence[tuple[_Stream, _Item]]) -> None:
        """One wake-up a loop, however many streams it has."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _Item]]] = {}
        for stream, item in items:
            by_loop.setdefault(stream.loop, []).append((stream, item))
        for loop, part in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a closed loop: nobody listens any more
                loop.call_soon_threadsafe(_deliver, part)

    def _die(self, error: BaseException | None) -> None:
        """Fail everything that is pending, also what nobody has read from the queue yet."""
        with self._lock:
            self._error = error
            self._draining = self._stopping = True
        pending = list(self._streams.values())
        self._streams.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, _Stream):
                    pending.append(command)
        self._put([(stream, _stopped(error)) for stream in pending])
        self._ended(len(pending))
        if error is None:
            self.engine.abort_all()


def _deliver(items: Sequence[tuple[_Stream, _Item]]) -> None:
    for stream, item in items:
        stream.put(item)


def _stopped(error: BaseException | None) -> InfcError:
    if error is None:
        return InfcError("the engine was shut down")
    return InfcError(f"the engine failed: {type(error).__name__}: {error}")
