"""From an engine to whoever waits: outputs of requests, on the event loop of a caller."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..ir.errors import InfcError
from .memory_reserve import RESERVE
from .requests.outputs import RequestOutput
from .requests.request_stream import PreparedRequest

Item = RequestOutput | InfcError

Sink = Callable[[int, RequestOutput], bool]
"""Takes an output with the number of its request, or gives it back: whether it was taken."""


class Listener(Protocol):
    """Where the outputs of one request go; `number` is its place among those of its caller.

    `is_lost` is set where an output could not be handed over: nothing more is, and whoever looks
    after listeners tells the caller. `has_ended` says whether the caller has read its end.
    """

    inbox: Inbox
    number: int
    is_lost: bool
    has_ended: bool

    def want(self) -> None:
        """Its caller has read everything that was put into the inbox."""


_Listener = TypeVar("_Listener", bound=Listener)


class Inbox:
    """What has arrived for one caller, in its order; used on the loop's thread.

    It holds little: the engine tells of a request again once its last output was taken out.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.sink: Sink | None = None
        """Asked first, while a reader waits; not for the last output of a request."""
        self._unread: deque[tuple[Listener, Item]] = deque()
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._unread)

    def put(self, stream: Listener, item: Item) -> None:
        """Take something in."""
        reader = self._reader
        if reader is None or reader.done():
            self._unread.append((stream, item))
        elif self._sinks(stream, item):
            stream.want()
        else:
            self._unread.append((stream, item))
            reader.set_result(None)

    def _sinks(self, stream: Listener, item: Item) -> bool:
        if self.sink is None or isinstance(item, InfcError) or item.finished:
            return False
        try:
            return self.sink(stream.number, item)
        except Exception:  # the reader meets it, and others get what is theirs
            return False

    def lacks(self, stream: Listener) -> bool:
        """Whether nothing of a stream is left to read."""
        return all(each is not stream for each, _ in self._unread)

    async def get(self) -> tuple[Listener, Item]:
        """What comes next, as soon as there is anything."""
        while not self._unread:
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        stream, item = self._unread.popleft()
        stream.want()
        return stream, item


@dataclass(slots=True, eq=False)
class Stream:
    """A request of an engine in this process, and where its outputs go: a `Listener`."""

    request: PreparedRequest
    inbox: Inbox
    number: int = 0
    is_lost: bool = False
    has_ended: bool = False

    @property
    def request_id(self) -> str:
        """The name of the request."""
        return self.request.request.request_id

    def want(self) -> None:
        """Let the engine tell what comes next."""
        self.request.stream.want()

    def fail(self, error: InfcError) -> None:
        """Take an error in, where nothing else is left to read, and the end has not been read."""
        if not self.has_ended and self.inbox.lacks(self):
            self.inbox.put(self, error)


@dataclass(slots=True, eq=False)
class Reader:
    """Reads what comes of some requests; `leave` is called once nobody reads them any more.

    Not closing it leaves the engine at work for nobody. `num_open` requests have not ended.
    """

    inbox: Inbox
    num_open: int
    leave: Callable[[], None] | None

    @property
    def has_more(self) -> bool:
        """Whether `get` need not wait."""
        return len(self.inbox) > 0

    def divert(self, sink: Sink) -> None:
        """While `get` waits, let `sink` take what arrives, which `get` then does not return."""
        self.inbox.sink = sink

    async def get(self) -> tuple[int, RequestOutput]:
        """The next output, with the number of its request; the last of each is `finished`.

        Raises the InfcError that ended one.
        """
        stream, item = await self.inbox.get()
        if isinstance(item, InfcError) or item.finished:
            stream.has_ended = True
            self.num_open -= 1
        if isinstance(item, InfcError):
            raise item
        return stream.number, item

    def close(self) -> None:
        """End the requests that have not; a second call does nothing."""
        leave, self.leave = self.leave, None
        if leave is not None:
            leave()


def hand_over(items: Sequence[tuple[_Listener, Item]]) -> list[_Listener]:
    """Put each output into its stream, with one wake-up a loop; the streams that are lost now.

    That is where memory is short, or a loop closed: then nobody listens any more. Raises nothing.
    """
    lost: list[_Listener] = []
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, Item]]] = {}
    try:
        for stream, item in items:
            if not stream.is_lost:  # what it lacks would be missing in its middle
                by_loop.setdefault(stream.inbox.loop, []).append((stream, item))
    except MemoryError:
        RESERVE.free()
        by_loop.clear()
        lost = [stream for stream, _ in items]
    for loop, part in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, part)
        except Exception as error:
            if isinstance(error, MemoryError):
                RESERVE.free()
            lost += [stream for stream, _ in part]
    for stream in lost:
        stream.is_lost = True
    return lost


def _deliver(items: Sequence[tuple[Listener, Item]]) -> None:
    for stream, item in items:
        stream.inbox.put(stream, item)
