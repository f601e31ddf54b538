"""The engine for many callers at once: one thread owns it, asyncio streams come out of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..ir.errors import ArtifactError, DeviceError, DrainingError, InfcError, RequestError
from .async_streams import Inbox, Item, Reader, Stream, hand_over
from .engine import Engine, EngineStats
from .faults import note_fault
from .memory_reserve import RESERVE
from .publisher import rest_of
from .requests.lengths import is_long
from .requests.outputs import RequestOutput, merge_outputs
from .requests.pooling import Pooling
from .requests.request_stream import PreparedRequest
from .requests.resumption import Resumption
from .sampling.sampling_params import SamplingParams
from .scheduling.owners import StepTimes

if TYPE_CHECKING:
    from .replicas.replica import ReplicaStats

_IDLE_SECONDS = 0.005
"""How long a request may wait for work that is done while there is nothing to do."""

_KEEP_STEPS = 256
"""After so many steps memory is kept back again, where it had to be freed."""

_UNDELIVERED = "an output of this request could not be handed over"

_PATROL_SECONDS = 0.5
"""How long a caller may wait whom nobody told that nothing more will come."""

_MAX_FAILED_STEPS = 3
"""After so many steps in a row that failed the engine is lost."""


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    stream: Stream | None = None


_Command = Stream | _Abort | None  # None wakes the thread up


class AsyncEngine:
    """Runs an engine on a thread of its own; commands go in by one queue, outputs out by another.

    The thread starts with the object. A step that fails ends the requests in it, and no others.
    After several in a row, or of an error that is neither ours nor one of memory, the thread ends:
    `healthy` turns false, and every pending and later request fails with the reason. Nobody waits
    for ever.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._waiting: dict[asyncio.AbstractEventLoop, set[Stream]] = {}  # whom patrols look after
        self._process = os.getpid()
        self._num_failed_steps = 0
        self._works_ahead = True
        self._pending: set[Stream] = set()
        # Kept until it is done with: what fails on the way is not lost from sight.
        self._command: _Command = None
        self._unsent: Sequence[RequestOutput] = ()
        self._lock = threading.Lock()  # guards _draining and _error against the thread
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
        return self._error is None and not self._stopping and self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What the engine's thread died of."""
        return self._error

    @property
    def num_pending(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._pending)

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.engine.plan.limits.max_context

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt, checked. Thread-safe."""
        return self.engine.encode(prompt)

    def watch_steps(self, on_step: Callable[[StepTimes], None]) -> None:
        """Tell `on_step` of each step that ran to its end; it must be quick."""
        self.engine.on_step = on_step

    def stats(self) -> EngineStats:
        """Counts of about now."""
        return self.engine.stats()

    def replicas(self) -> Sequence[ReplicaStats]:
        """None: the engine is in this process."""
        return ()

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        resumed: Resumption | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """What steps add to the request, the last one with its finish reason.

        Closing or cancelling the iterator ends the request. It has one output a step, unless who
        reads is behind: what that leaves unread is joined together, so it is bounded by the length
        of the answer. `resumed` is what another engine told of this very request, which goes on
        behind it. Raises RequestError and CapacityError (DrainingError after `drain`) before the
        first output, InfcError when the engine stops.
        """
        names = None if request_id is None else [request_id]
        reader = await self.read(
            [prompt], params, names, priority=priority, cache_salt=cache_salt, resumed=[resumed]
        )
        try:
            while reader.num_open:
                _, output = await reader.get()
                yield output
        finally:
            reader.close()

    async def read(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        request_ids: Sequence[str] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        whole: bool = False,
        resumed: Sequence[Resumption | None] | None = None,
    ) -> Reader:
        """Begin a request for each prompt, which one caller reads together and must close.

        With `whole` each has two outputs: one with its first token, and one with all others.
        `resumed` has what another engine told of each, None for one that begins anew. Raises what
        `generate` does; none has begun then. What the queue refuses, `Reader.get` raises.
        """
        if request_ids is None:
            request_ids = [f"infc-{next(self._ids)}" for _ in prompts]
        told = [None] * len(prompts) if resumed is None else resumed

        def prepare() -> list[PreparedRequest]:
            return [
                self.engine.prepare(
                    name,
                    prompt,
                    params,
                    priority,
                    cache_salt=cache_salt,
                    whole=whole,
                    resumed=known,
                )
                for name, prompt, known in zip(request_ids, prompts, told, strict=True)
            ]

        return self._begin(await self._prepared(prepare, is_long(prompts, params, told)))

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

        def prepare() -> list[PreparedRequest]:
            one = self.engine.prepare_reading(
                f"infc-{next(self._ids)}",
                prompt,
                pooling=pooling,
                first_scored=first_scored,
                priority=priority,
                cache_salt=cache_salt,
            )
            return [one]

        reader, outputs = self._begin(await self._prepared(prepare, is_long([prompt]))), []
        try:
            while reader.num_open:
                outputs.append((await reader.get())[1])
        finally:
            reader.close()
        return merge_outputs(outputs)

    def abort(self, request_id: str) -> None:
        """End a request soon; its iterator gets a last output with finish reason "abort"."""
        self._commands.put(_Abort(request_id))

    async def drain(self, timeout_seconds: float | None = None) -> bool:
        """Take no more requests, wait for those there are; whether all of them ended in time."""
        with self._lock:
            self._draining = True
        loop = asyncio.get_running_loop()
        deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        while self._pending and self._thread.is_alive():
            if deadline is not None and loop.time() >= deadline:
                return False
            await asyncio.sleep(0.01)
        return not self._pending

    def stop(self) -> None:
        """Let the thread end after its current step, and fail what is pending; returns at once.

        It takes no lock, so that a garbage collector may call it anywhere.
        """
        self._stopping = True
        self._commands.put(None)

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Stop the thread after its current step, fail what is pending, and close the engine."""
        if os.getpid() != self._process:  # whatever state it was in, the thread is not here
            self.engine.give_back()
            return
        with self._lock:
            self._draining = True
        self.stop()
        self._thread.join(timeout_seconds)
        if not self._thread.is_alive():
            self.engine.close()

    # --- inside -------------------------------------------------------------------------------

    async def _prepared(
        self, prepare: Callable[[], list[PreparedRequest]], takes_long: bool
    ) -> list[PreparedRequest]:
        """Requests, checked and built: never on the engine's thread, and no long ones here."""
        return await asyncio.to_thread(prepare) if takes_long else prepare()

    def _begin(self, requests: Sequence[PreparedRequest]) -> Reader:
        inbox = Inbox(asyncio.get_running_loop())
        streams = [Stream(request, inbox, number) for number, request in enumerate(requests)]
        reader = Reader(inbox, len(streams), partial(self._leave, streams))
        try:
            for stream in streams:
                self._submit(stream)
                self._look_after(stream)
        except BaseException:
            reader.close()
            raise
        return reader

    def _leave(self, streams: Sequence[Stream]) -> None:
        """Nobody reads these any more: those that have not ended do so."""
        for stream in streams:
            if (waiting := self._waiting.get(stream.inbox.loop)) is not None:
                waiting.discard(stream)
            if not stream.has_ended:
                self._commands.put(_Abort(stream.request_id, stream))

    def _look_after(self, stream: Stream) -> None:
        """Have patrols on the stream's loop as long as anybody waits there."""
        own = stream.inbox.loop
        if own in self._waiting:
            self._waiting[own].add(stream)
            return
        for loop in list(self._waiting):
            if loop.is_closed():
                self._waiting.pop(loop, None)
        self._waiting[own] = {stream}
        own.call_later(_PATROL_SECONDS, self._patrol, own)

    def _patrol(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell those who wait for what will never come; else the thread has told them."""
        waiting = self._waiting[loop]
        lives = self._thread.is_alive()
        for stream in waiting:
            if (stream.is_lost or not lives) and not stream.has_ended:
                # Behind whatever the thread may have handed over as its last.
                error = InfcError(_UNDELIVERED) if lives else _stopped(self._error)
                loop.call_soon(stream.fail, error)
        if waiting:
            loop.call_later(_PATROL_SECONDS, self._patrol, loop)
        else:
            del self._waiting[loop]

    def _submit(self, stream: Stream) -> None:
        if os.getpid() != self._process:
            raise InfcError(
                "the engine was opened before this process was forked, and its thread stayed"
                " behind",
                hint="open the artifact after the fork",
            )
        with self._lock:
            if self._error is not None:
                raise _stopped(self._error)
            if self._draining:
                raise DrainingError("no more requests are accepted: the engine is shutting down")
            self._pending.add(stream)
            self._commands.put(stream)

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while not self._stopping:
                try:
                    self._take_commands()
                    self._step()
                except Exception as error:
                    self._survive(error)
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._die(error)
        else:
            self._die(None)

    def _step(self) -> None:
        before = self.engine.num_steps
        RESERVE.ease()
        self._unsent = self.engine.step()
        if self.engine.num_steps > before:
            self._num_failed_steps = 0
        self._send(self._unsent)
        self._unsent = ()

    def _survive(self, error: Exception) -> None:
        """Fail those whom the engine gave up; raises the error where it is the end of all."""
        self._num_failed_steps += 1
        # Of any other error nobody knows what it leaves behind.
        is_known = isinstance(error, (MemoryError, InfcError))
        # Neither weights that changed nor a GPU that failed become right again.
        is_final = isinstance(error, (ArtifactError, DeviceError))
        is_final = is_final or self._num_failed_steps >= _MAX_FAILED_STEPS
        if is_final or not is_known:
            raise error
        note_fault("a step", error)
        for output in self._unsent:
            self.engine.abort(output.request_id)
        command = self._command
        lost = [s for s in self._streams.values() if not self.engine.knows(s.request_id)]
        if isinstance(command, Stream) and command not in self._streams.values():
            lost.append(command)
        if isinstance(command, _Abort):
            self._commands.put(command)
        self._unsent, self._command = (), None
        reason = InfcError(f"the step failed: {type(error).__name__}: {error}")
        self._fail(lost, reason)
        self._close(lost)

    def _take_commands(self) -> None:
        """Obey what is in the queue; with nothing else to do, wait for it."""
        wait = not self.engine.has_unfinished
        if wait or self.engine.num_steps % _KEEP_STEPS == 0:
            RESERVE.keep()
        while wait and self._commands.empty() and self._work_ahead():
            pass
        while True:
            try:
                self._command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(self._command, Stream):
                self._add(self._command)
            elif isinstance(self._command, _Abort):
                self._abort(self._command)
            self._command = None

    def _work_ahead(self) -> bool:
        """Whether there is more to do ahead of steps, which are right without it as well."""
        try:
            return self._works_ahead and self.engine.work_ahead(_IDLE_SECONDS)
        except ArtifactError:
            raise
        except Exception as error:
            self._works_ahead = False
            note_fault("working ahead of steps", error)
            return False

    def _add(self, stream: Stream) -> None:
        request_id = stream.request_id
        if request_id in self._streams:
            error = RequestError(f"request id {request_id!r} is already in use", field="request_id")
            self._refuse(stream, error)
            return
        self._streams[request_id] = stream
        try:
            self.engine.submit(stream.request)
        except InfcError as error:
            self._refuse(stream, error)

    def _refuse(self, stream: Stream, error: InfcError) -> None:
        self._put([(stream, error)])
        self._close([stream])

    def _abort(self, command: _Abort) -> None:
        stream = self._streams.get(command.request_id)
        if stream is None or command.stream not in (None, stream):
            return  # it has ended; or its id belongs to somebody else by now
        output = self.engine.abort(command.request_id)
        if output is not None:
            self._send([output])

    def _send(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand outputs to their streams, and forget those that ended."""
        if not outputs:
            return
        items = [(self._streams[output.request_id], output) for output in outputs]
        for stream, _ in items:
            stream.request.stream.is_wanted = False  # until its reader has this one
        self._put(items)
        self._close([stream for stream, output in items if output.finished])

    def _close(self, streams: Sequence[Stream]) -> None:
        """Forget streams that have been told of their end."""
        for stream in streams:
            self._pending.discard(stream)
            if self._streams.get(stream.request_id) is stream:
                del self._streams[stream.request_id]

    def _put(self, items: Sequence[tuple[Stream, Item]]) -> None:
        """Hand outputs over, and give up requests of which one cannot be."""
        for stream in hand_over(items):
            if self._streams.get(stream.request_id) is stream and not self._stopping:
                self._commands.put(_Abort(stream.request_id, stream))

    def _die(self, error: BaseException | None) -> None:
        """Fail everything that is pending, whether it waits in the queue or has begun."""
        with self._lock:
            self._error = error
            self._draining = self._stopping = True
        try:
            self._fail_all(_stopped(error))
        except Exception as late:  # then patrols tell them
            note_fault("telling that the engine stopped", late)
        self._pending.clear()
        if error is None:
            self.engine.abort_all()

    def _fail_all(self, reason: InfcError) -> None:
        pending = list(self._pending)
        self._streams.clear()
        self._fail(pending, reason)

    def _fail(self, streams: Sequence[Stream], reason: InfcError) -> None:
        """Tell streams why they end, behind what was kept for those who read slowly.

        The first error may be the end of all that one caller reads, so it comes behind all of it.
        """
        outputs = [(stream, rest_of(stream.request.stream)) for stream in streams]
        items: list[tuple[Stream, Item]] = [(s, output) for s, output in outputs if output]
        self._put([*items, *((stream, reason) for stream in streams)])


def _stopped(error: BaseException | None) -> InfcError:
    if error is None:
        return DrainingError("the engine was shut down")
    return InfcError(f"the engine failed: {type(error).__name__}: {error}")
