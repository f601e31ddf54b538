"""What routes take for an engine: the engines of a deployment, and no stream is lost."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from ray import exceptions as failures
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.exceptions import RayServeException as ServeError

from ...ir.errors import CapacityError, DrainingError, InfcError, RequestError
from ...runtime.async_streams import Inbox, Reader
from ...runtime.engine import EngineStats
from ...runtime.faults import note_fault
from ...runtime.replicas.checks import encode_prompt, text_of
from ...runtime.replicas.messages import (
    VERSION,
    Failed,
    Told,
    error_of,
    from_engine,
    payload_of,
    step_times_of,
)
from ...runtime.replicas.replica import ReplicaStats, summed
from ...runtime.replicas.streams import RemoteStream
from ...runtime.replicas.suspects import MOST_STRIKES, given_up
from ...runtime.requests.lengths import is_long
from ...runtime.requests.request_checks import check_params
from ...runtime.sampling.sampling_params import SamplingParams
from ...runtime.scheduling.owners import StepTimes
from .described import Described
from .errands import Errand

if TYPE_CHECKING:
    from ...runtime.text.tokenizer import Tokenizer

_LOG = logging.getLogger("infc.runtime")
_FRESH_SECONDS = 10.0  # for which counts of an engine that says nothing more are told
_LOOK_SECONDS = 0.25
_FIRST_DELAY_SECONDS = 0.05
_MOST_DELAY_SECONDS = 2.0
_GONE = (
    failures.RayActorError,
    failures.WorkerCrashedError,
    failures.NodeDiedError,
    failures.LocalRayletDiedError,
    failures.ObjectLostError,
    failures.OutOfMemoryError,
    failures.RpcError,
)
"""What Ray raises where a replica, or what it has sent, is no longer there."""


class _LostError(Exception):
    """The engine does not go on with a request: the rest of it is asked for elsewhere."""


class RemoteEngines:
    """A `ServedEngine`. Everything happens on the event loop of who calls `read`.

    Each request is one streaming call of a deployment. Where its replica dies, says nothing for
    too long, or ends, the rest is asked for by a further call, which has all that was told.
    """

    def __init__(
        self,
        handle: Any,
        described: Described,
        tokenizer: Tokenizer | None,
        *,
        identity: str,
        vocab_size: int,
        hang_seconds: float,
    ) -> None:
        self.max_context = described.max_context
        self._answer = handle.options(stream=True).answer
        self._block_size = described.block_size
        self._tokenizer = tokenizer
        self._identity = identity
        self._vocab_size = vocab_size
        self._hang_seconds = hang_seconds
        self._ids = itertools.count()
        self._pending: dict[str, RemoteStream] = {}
        self._tasks: dict[RemoteStream, asyncio.Task[None]] = {}
        self._alone = asyncio.Lock()  # held by a request that may be why engines died
        self._stats: dict[str, tuple[float, EngineStats]] = {}
        self._on_step: Callable[[StepTimes], None] | None = None
        self._is_stopped = False

    # --- ServedEngine -------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Whether requests are taken; they wait where there is no engine."""
        return not self._is_stopped

    @property
    def num_pending(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._pending)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt, checked. Thread-safe."""
        return encode_prompt(prompt, self._tokenizer, self._vocab_size)

    def stats(self) -> EngineStats:
        """Counts of about now, of engines that have requests of this front."""
        now = time.monotonic()
        self._stats = {
            name: told for name, told in self._stats.items() if now - told[0] < _FRESH_SECONDS
        }
        return summed([stats for _, stats in self._stats.values()], 0)

    def replicas(self) -> Sequence[ReplicaStats]:
        """None: Ray itself tells of its replicas."""
        return ()

    def watch_steps(self, on_step: Callable[[StepTimes], None]) -> None:
        """Tell `on_step` of each step."""
        self._on_step = on_step

    async def read(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        request_ids: Sequence[str] | None = None,
        *,
        whole: bool = False,
    ) -> Reader:
        """As `AsyncEngine.read`; what an engine refuses, `Reader.get` raises."""
        if self._is_stopped:
            raise DrainingError("no more requests are accepted: the front is shutting down")
        names = request_ids or [f"infc-{next(self._ids)}" for _ in prompts]
        chosen = SamplingParams() if params is None else params
        check_params(chosen, vocab_size=self._vocab_size, has_tokenizer=self._tokenizer is not None)
        inbox = Inbox(asyncio.get_running_loop())

        def prepare() -> list[RemoteStream]:
            return [
                RemoteStream(
                    name,
                    self.encode(prompt),
                    chosen,
                    inbox,
                    number,
                    text_of(prompt),
                    whole=whole,
                    block_size=self._block_size,
                )
                for number, (name, prompt) in enumerate(zip(names, prompts, strict=True))
            ]

        takes_long = is_long(prompts, params, [None] * len(prompts))
        streams = await asyncio.to_thread(prepare) if takes_long else prepare()
        for stream in streams:
            if stream.request_id in self._pending:
                raise RequestError(
                    f"request id {stream.request_id!r} is already in use", field="request_id"
                )
        for stream in streams:
            self._pending[stream.request_id] = stream
            # In a context of its own: calls in that of an HTTP request all have its id, by which
            # Ray would take those of several prompts for one.
            self._tasks[stream] = inbox.loop.create_task(
                self._follow(stream), context=contextvars.Context()
            )
        return Reader(inbox, len(streams), lambda: self._leave(streams))

    def abort(self, request_id: str) -> None:
        """End a request soon; its reader gets a last output with finish reason "abort"."""
        stream = self._pending.get(request_id)
        if stream is not None and not stream.is_over:
            stream.inbox.put(stream, stream.aborted())
            self._drop(stream)

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Fail what is pending, and take nothing more."""
        self._is_stopped = True
        for stream in list(self._pending.values()):
            self._fail(stream, DrainingError("the front was shut down"))
            self._drop(stream)

    # --- inside -------------------------------------------------------------------------------

    def _leave(self, streams: Sequence[RemoteStream]) -> None:
        """Nobody reads these any more."""
        for stream in streams:
            stream.is_over = True
            self._drop(stream)

    def _drop(self, stream: RemoteStream) -> None:
        if (task := self._tasks.get(stream)) is not None:
            task.cancel()
        self._forget(stream)

    def _forget(self, stream: RemoteStream) -> None:
        self._tasks.pop(stream, None)
        if self._pending.get(stream.request_id) is stream:
            del self._pending[stream.request_id]

    def _fail(self, stream: RemoteStream, error: InfcError) -> None:
        if not stream.is_over:
            for item in stream.last_items(error):
                stream.inbox.put(stream, item)

    async def _follow(self, stream: RemoteStream) -> None:
        """Ask engines for a request until it has ended."""
        delay = _FIRST_DELAY_SECONDS
        try:
            while not stream.is_over:
                try:
                    await self._ask(stream)
                except _LostError as error:
                    _LOG.warning("request %s goes on elsewhere: %s", stream.request_id, error)
                    if stream.num_strikes > MOST_STRIKES:
                        raise given_up() from None
                    delay = _FIRST_DELAY_SECONDS if stream.is_proven else 2 * delay
                    await asyncio.sleep(min(delay, _MOST_DELAY_SECONDS))
        except InfcError as error:
            self._fail(stream, error)
        except Exception as error:
            self._fail(stream, InfcError(note_fault("asking for a request", error)))
        finally:
            self._forget(stream)

    async def _ask(self, stream: RemoteStream) -> None:
        """Ask one engine for the rest. Raises _LostError where it does not finish it."""
        # Engines that died may have done so because of it: then it waits for others of its kind.
        is_suspect = stream.num_strikes >= MOST_STRIKES
        place: AbstractAsyncContextManager[Any]
        place = self._alone if is_suspect else contextlib.nullcontext()
        async with place:
            errand = Errand(payload_of(stream.order(0)), stream.as_arrival)
            answers = self._answer.remote(errand, VERSION, self._identity)
            try:
                async for payload in self._heard(answers, errand):
                    self._take(stream, errand, payload)
                    if stream.is_over:
                        return
            except _LostError:
                # An engine that has not taken it did not die of it.
                stream.num_strikes += errand.is_accepted
                raise
            finally:
                errand.is_over = True
                if not stream.is_over or stream.is_unwanted:
                    answers.cancel()
            raise _LostError("its replica ends")

    async def _heard(self, answers: Any, errand: Errand) -> AsyncIterator[bytes]:
        """What an engine says. Raises _LostError where it is gone, or silent for too long."""
        next_one: asyncio.Future[bytes] | None = None
        heard_at = time.monotonic()
        try:
            while True:
                next_one = next_one or asyncio.ensure_future(anext(answers))
                done, _ = await asyncio.wait({next_one}, timeout=_LOOK_SECONDS)
                if not done:
                    # As long as it waits for a replica with room, replicas are tried.
                    if time.monotonic() - max(heard_at, errand.tried_at) > self._hang_seconds:
                        errand.was_silent = True
                        raise _LostError(f"nothing came for {self._hang_seconds:g} s")
                    continue
                got, next_one = next_one, None
                heard_at = time.monotonic()
                try:
                    payload = got.result()
                except StopAsyncIteration:
                    return
                except (Exception, asyncio.CancelledError) as error:
                    raise _meaning_of(error) from None
                yield payload
        finally:
            if next_one is not None:
                next_one.cancel()

    def _take(self, stream: RemoteStream, errand: Errand, payload: bytes) -> None:
        """Take in a message of an engine. Raises the InfcError with which it refuses a request."""
        message = from_engine(payload)
        if isinstance(message, Failed):
            raise error_of(message.failure)
        assert isinstance(message, Told)
        for added in message.outputs:
            errand.is_proven = True
            output = stream.take(added)
            if output is not None:
                stream.inbox.put(stream, output)
        if message.stats is not None and errand.replica is not None:
            s = message.stats
            stats = EngineStats(
                s.num_waiting,
                s.num_running,
                s.num_free_blocks,
                s.num_blocks,
                s.num_preemptions,
                s.num_steps,
            )
            self._stats[errand.replica] = (time.monotonic(), stats)
        if self._on_step is not None:
            for report in message.reports:
                self._on_step(step_times_of(report))


def _meaning_of(error: BaseException) -> Exception:
    """What an error of a call means for its request."""
    if isinstance(error, BackPressureError):
        return CapacityError("too many requests are already waiting", hint="try again later")
    if isinstance(error, DeploymentUnavailableError):
        return InfcError("no engine is left: Ray could not deploy any", hint="see `serve status`")
    if isinstance(error, (*_GONE, asyncio.CancelledError, failures.TaskCancelledError)):
        return _LostError(_first_line(error) or type(error).__name__)
    if isinstance(error, ServeError):  # a replica that was ended, or cannot be reached
        return _LostError(_first_line(error))
    if isinstance(error, Exception):
        return error
    return InfcError(f"{type(error).__name__}: {error}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
