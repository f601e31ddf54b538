"""The front of several engine processes: the interface of one engine, and no stream is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from bisect import insort
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from operator import attrgetter

from ...ir.errors import DrainingError, InfcError, RequestError
from ...ir.sizes import format_count
from ..async_streams import Inbox, Item, Reader, hand_over
from ..engine import EngineStats
from ..faults import note_fault
from ..requests.lengths import is_long
from ..requests.outputs import RequestOutput
from ..requests.request_checks import check_params, check_place
from ..requests.resumption import Resumption
from ..sampling.sampling_params import SamplingParams
from ..scheduling.owners import StepTimes
from .checks import check_room, encode_prompt, of_replica, stopped, text_of
from .child import Death, SpareProcess
from .config import FrontConfig
from .frames import FrameError
from .kept_back import SUCCESSOR_SECONDS, KeptBack
from .messages import Told, error_of, step_times_of
from .replica import Replica, ReplicaStats, summed
from .silence import SilenceWatch
from .streams import RemoteStream
from .suspects import Suspects, given_up

_LOG = logging.getLogger("infc.runtime")
_MOST_TICK_SECONDS = 0.25
_RANK = attrgetter("rank")
_CLOSE_SECONDS = 1.0
_SPARE_SECONDS = 0.5  # after a start, so that requests that wait for it come first


class Front:
    """Engine processes behind the interface of `AsyncEngine`, on a thread of its own.

    A request goes to one of them. Where that dies, or says nothing for too long, the rest of the
    request is computed by another one, or by its successor: the outputs go on with the same bytes.
    """

    def __init__(self, config: FrontConfig) -> None:
        self.tokenizer = config.tokenizer
        self.max_context = config.max_context
        self._config = config
        self._on_step: Callable[[StepTimes], None] | None = None
        self._ids = itertools.count()
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards `_pending` and `_draining` against callers
        self._pending: dict[str, RemoteStream] = {}
        self._draining = False
        self._is_stopping = False
        self._error: InfcError | None = None
        # What follows belongs to the thread.
        self._places: dict[RemoteStream, tuple[Replica, int]] = {}
        self._unplaced: list[RemoteStream] = []
        self._suspects = Suspects()
        self._kept_back = KeptBack()
        self._lost: set[RemoteStream] = set()
        self._arrivals = itertools.count()
        self._end = asyncio.Event()
        self._silence = SilenceWatch(config.hung_seconds)
        self._opened = threading.Event()
        self._loop = asyncio.SelectorEventLoop()  # the policy's may be uvloop's, as on Ray
        self._spare_process = SpareProcess(config.start)
        self._replicas = [
            Replica(index, order, self._spare_process.take, self)
            for index, order in enumerate(config.orders)
        ]
        self._thread = threading.Thread(target=self._run, name="infc-front", daemon=True)
        self._thread.start()

    # --- for callers --------------------------------------------------------------------------

    def wait_until_open(self) -> None:
        """Until every replica is ready. Raises the InfcError that keeps one from being."""
        self._opened.wait()
        if self._error is not None:
            raise self._error

    @property
    def healthy(self) -> bool:
        """Whether requests are answered, be it after a pause."""
        return self._error is None and not self._is_stopping and self._thread.is_alive()

    @property
    def error(self) -> InfcError | None:
        """Why no engine is left."""
        return self._error

    @property
    def num_pending(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._pending)

    def stats(self) -> EngineStats:
        """Counts of about now, of all replicas together."""
        return summed([replica.stats for replica in self._replicas], len(self._unplaced))

    def replicas(self) -> list[ReplicaStats]:
        """Each replica, as it is about now."""
        return [replica.glance() for replica in self._replicas]

    def replica_of(self, request_id: str) -> int | None:
        """Which replica has a request now; None for one that waits, or has ended."""
        stream = self._pending.get(request_id)
        place = None if stream is None else self._places.get(stream)
        return None if place is None else place[0].index

    def watch_steps(self, on_step: Callable[[StepTimes], None]) -> None:
        """Tell `on_step` of each step of any replica, on the front's thread."""
        self._on_step = on_step

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt, checked. Thread-safe."""
        return encode_prompt(prompt, self.tokenizer, self._config.vocab_size)

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
        """As `AsyncEngine.generate`."""
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
        """As `AsyncEngine.read`; what an engine refuses, `Reader.get` raises.

        With `whole`, each has few outputs, and not only two.
        """
        if request_ids is None:
            request_ids = [f"infc-{next(self._ids)}" for _ in prompts]
        chosen = SamplingParams() if params is None else params
        told = [None] * len(prompts) if resumed is None else resumed
        has_tokenizer = self.tokenizer is not None
        check_params(chosen, vocab_size=self._config.vocab_size, has_tokenizer=has_tokenizer)
        check_place(priority, cache_salt)
        inbox, policy = Inbox(asyncio.get_running_loop()), self._config.policy
        block_size = self._config.block_size if policy.needs_blocks else None
        make = partial(
            RemoteStream,
            priority=priority,
            cache_salt=cache_salt,
            whole=whole,
            block_size=block_size,
        )

        def prepare() -> list[RemoteStream]:
            each = enumerate(zip(request_ids, prompts, told, strict=True))
            return [
                make(name, self.encode(one), chosen, inbox, number, text_of(one), resumed=known)
                for number, (name, one, known) in each
            ]

        takes_long = is_long(prompts, params, told)
        streams = await asyncio.to_thread(prepare) if takes_long else prepare()
        self._submit(streams)
        return Reader(inbox, len(streams), lambda: self._leave(streams))

    def abort(self, request_id: str) -> None:
        """End a request soon; its iterator gets a last output with finish reason "abort"."""
        if (stream := self._pending.get(request_id)) is not None:
            self._call(self._abort, stream)

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
        """Fail what is pending, and end the engines; returns at once."""
        with self._lock:
            self._draining = self._is_stopping = True
        self._call(self._end.set)

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Fail what is pending, end the engines and wait for that."""
        self.stop()
        self._thread.join(timeout_seconds)

    def _call(self, work: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the thread has ended, and told everybody
            self._loop.call_soon_threadsafe(work, *arguments)

    def _submit(self, streams: Sequence[RemoteStream]) -> None:
        with self._lock:
            if self._error is not None:
                raise stopped(self._error)
            if self._draining:
                raise DrainingError("no more requests are accepted: the engine is shutting down")
            if len(self._pending) + len(streams) > self._config.max_waiting:
                self._check_room(len(streams))
            for stream in streams:
                if stream.request_id in self._pending:
                    raise RequestError(
                        f"request id {stream.request_id!r} is already in use", field="request_id"
                    )
            self._pending.update((stream.request_id, stream) for stream in streams)
        self._call(self._add, streams)

    def _check_room(self, num_new: int) -> None:
        waits_here = (each for each in self._pending.values() if each not in self._places)
        num_here = sum(not each.has_told for each in waits_here)
        num_there = sum(replica.num_queued for replica in self._replicas)
        check_room(num_here + num_there, num_new, self._config.max_waiting)

    def _leave(self, streams: Sequence[RemoteStream]) -> None:
        """Nobody reads these any more."""
        if open_ones := [stream for stream in streams if not stream.has_ended]:
            self._call(self._drop, open_ones)

    # --- on the thread: requests --------------------------------------------------------------

    def _add(self, streams: Sequence[RemoteStream]) -> None:
        for stream in streams:
            stream.arrival = next(self._arrivals)
            if not stream.is_over:
                self._place(stream)

    def _place(self, stream: RemoteStream) -> None:
        """Give a request to a replica, or end it with the reason: it is never lost from sight."""
        try:
            self._choose(stream)
        except Exception as error:
            reason = note_fault("giving a request to an engine", error)
            self._fail([stream], InfcError(reason))

    def _choose(self, stream: RemoteStream) -> None:
        """Give a request to a replica; it waits here while none is ready, or has room.

        What waits in an engine could not go to another one that has room before.
        """
        candidates = [each.candidate for each in self._open_ones()]
        if not candidates:
            insort(self._unplaced, stream, key=_RANK)
            return
        choice = self._config.policy.choose(stream.as_arrival, candidates)
        stream.num_unread = len(stream.prompt) - choice.num_known
        self._send(self._replicas[choice.replica], stream)

    def _send(self, replica: Replica, stream: RemoteStream) -> None:
        number = next(self._numbers)
        try:
            replica.send(number, stream)
        except FrameError as error:
            self._fail([stream], RequestError(str(error)))
            return
        except Exception as error:
            reason = note_fault("sending a request to an engine", error)
            self._fail([stream], InfcError(reason))
            return
        self._places[stream] = (replica, number)

    def _abort(self, stream: RemoteStream) -> None:
        """End a request: by its engine, or here while it has none."""
        if stream.is_over:
            return
        stream.is_unwanted = True
        if (place := self._places.get(stream)) is not None:
            place[0].abort(place[1])
        else:
            self._end_unwanted(stream)

    def _end_unwanted(self, stream: RemoteStream) -> None:
        output = stream.aborted()
        self._forget(stream)
        self._hand_over([(stream, output)])

    def _drop(self, streams: Sequence[RemoteStream]) -> None:
        """End requests that nobody reads."""
        for stream in streams:
            if (place := self._places.get(stream)) is not None:
                place[0].abort(place[1])
                place[0].streams.pop(place[1], None)
            stream.is_over = True
            self._forget(stream)

    def _forget(self, stream: RemoteStream) -> None:
        """It has ended."""
        if (place := self._places.pop(stream, None)) is not None:
            place[0].streams.pop(place[1], None)
        elif stream in self._unplaced:
            self._unplaced.remove(stream)
        with self._lock:
            if self._pending.get(stream.request_id) is stream:
                del self._pending[stream.request_id]

    def _fail(self, streams: Sequence[RemoteStream], error: InfcError) -> None:
        """Tell why requests end, behind all that was told of each."""
        rests = [(stream, stream.last_items(error)) for stream in streams]
        # The first error may be the end of all that one caller reads, so it comes behind all of it.
        items = [(stream, item) for stream, rest in rests for item in rest[:-1]]
        self._hand_over([*items, *((stream, rest[-1]) for stream, rest in rests)])
        for stream in streams:
            self._forget(stream)

    def _hand_over(self, items: Sequence[tuple[RemoteStream, Item]]) -> None:
        self._lost.update(hand_over(items))

    # --- on the thread: what replicas say (`Owner`) --------------------------------------------

    def on_ready(self, replica: Replica) -> None:
        """Give it the requests that wait for an engine."""
        if all(each.state == "ready" for each in self._replicas):
            self._opened.set()
        self._loop.call_later(_SPARE_SECONDS, self._spare_process.fill)
        self._release(replica)
        self._settle()

    def on_told(self, replica: Replica, told: Told) -> None:
        """Hand over what steps gave."""
        items: list[tuple[RemoteStream, Item]] = []
        for added in told.outputs:
            stream = replica.streams.get(added.number)
            if stream is None:  # nobody reads it any more
                continue
            if (output := stream.take(added)) is not None:
                items.append((stream, output))
            if stream.is_over:
                self._forget(stream)
        self._hand_over(items)
        for number, failure in told.refusals:
            if (stream := replica.streams.get(number)) is not None:
                self._fail([stream], error_of(failure))
        if self._unplaced:
            self._settle()
        if told.stored or told.removed:
            self._config.policy.change(replica.index, told.stored, told.removed)
        if self._on_step is not None:
            for report in told.reports:
                self._on_step(step_times_of(report))
        if replica is self._suspects.isolated:
            self._suspects.observe(replica, len(told.reports))
            self._settle()

    def on_death(self, replica: Replica, death: Death, interrupted: Sequence[RemoteStream]) -> None:
        """Continue its requests elsewhere; those that may be the reason one at a time."""
        if not self._opened.is_set() and death.is_blamed:
            self._error = of_replica(replica, death.error)
            self._opened.set()
        _LOG.warning(
            "replica %d: %s; %s",
            replica.index,
            death.error,
            format_count(len(interrupted), "request"),
        )
        for stream in interrupted:
            self._places.pop(stream, None)
        try:
            self._continue(replica, death, interrupted)
        except Exception as error:
            reason = InfcError(note_fault("continuing requests elsewhere", error))
            places = self._places
            self._fail([s for s in interrupted if not (s.is_over or s in places)], reason)
        self._loop.call_later(SUCCESSOR_SECONDS, self._release, replica)
        self._settle()

    def _continue(
        self, replica: Replica, death: Death, interrupted: Sequence[RemoteStream]
    ) -> None:
        self._config.policy.clear(replica.index)
        poisonous: list[RemoteStream] = []
        if death.is_blamed:
            poisonous = self._suspects.examine(replica, interrupted)
        else:
            self._suspects.release(replica)
        self._fail(poisonous, given_up())
        going_on = []
        for stream in sorted(interrupted, key=_RANK):
            if stream.is_unwanted and not stream.is_over:
                self._end_unwanted(stream)
            elif not (stream.is_over or self._suspects.holds(stream)):
                replica.num_resumed += stream.has_told
                going_on.append(stream)
        num_ready = len(self._open_ones()) if self._spare_process.is_there else 0
        for stream in self._kept_back.share(replica, going_on, num_ready):
            self._place(stream)

    def on_given_up(self, replica: Replica, error: InfcError) -> None:
        """Go on with the others; without any, fail everything."""
        _LOG.error("replica %d is given up: %s", replica.index, error)
        is_opening = not self._opened.is_set()
        if is_opening or all(each.state == "given up" for each in self._replicas):
            with self._lock:
                self._error = self._error or (of_replica(replica, error) if is_opening else error)
                pending = list(self._pending.values())
            self._fail(pending, stopped(error))
            self._opened.set()

    def _ready(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.state == "ready"]

    def _open_ones(self) -> list[Replica]:
        """The replicas that take requests which need not be isolated."""
        most, isolated = self._config.most_sequences, self._suspects.isolated
        return [
            each for each in self._ready() if each is not isolated and each.num_sequences < most
        ]

    def _settle(self) -> None:
        """Give suspects to the isolated engine, and what waits to the others."""
        stream = self._suspects.next(self._ready())
        isolated = self._suspects.isolated
        if stream is not None and isolated is not None:
            self._send(isolated, stream)
        while self._unplaced and self._open_ones():
            self._place(self._unplaced.pop(0))

    def _release(self, replica: Replica) -> None:
        """Its successor is ready, or takes too long."""
        for stream in self._kept_back.release(replica):
            if replica.state == "ready" and replica is not self._suspects.isolated:
                self._send(replica, stream)
            else:
                self._place(stream)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:
            _LOG.error("the front failed", exc_info=error)
            self._end_all(InfcError(f"the front failed: {type(error).__name__}: {error}"))
        finally:
            if self._config.lease is not None:
                self._config.lease.end()
            self._opened.set()
            self._loop.close()

    async def _live(self) -> None:
        await asyncio.gather(*(replica.start() for replica in self._replicas))
        self._silence = SilenceWatch(self._config.hung_seconds)
        tick = min(_MOST_TICK_SECONDS, self._config.hung_seconds / 4)
        while not self._end.is_set():
            try:
                await asyncio.wait_for(self._end.wait(), tick)
            except TimeoutError:
                self._tick(tick)
        self._end_all(DrainingError("the engine was shut down"))
        self._spare_process.close()
        await asyncio.gather(*(replica.close(_CLOSE_SECONDS) for replica in self._replicas))

    def _end_all(self, error: InfcError) -> None:
        with self._lock:
            self._draining = True
            if not isinstance(error, DrainingError):
                self._error = error
            pending = list(self._pending.values())
        self._fail(pending, error)

    def _tick(self, seconds: float) -> None:
        """Kill engines that say nothing, and tell those who missed an output."""
        self._silence.look(self._replicas, seconds)
        self._spare_process.refill()
        lost, self._lost = self._lost, set()
        for stream in lost:
            self._drop([stream])
            error = InfcError("an output of this request could not be handed over")
            with contextlib.suppress(RuntimeError):  # its loop is closed
                stream.inbox.loop.call_soon_threadsafe(stream.inbox.put, stream, error)
