"""From the engine's thread to whoever waits: the outputs of each request, on its own event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.errors import InfcError
from .memory_reserve import RESERVE
from .requests.outputs import RequestOutput, merge_outputs
from .requests.request_stream import PreparedRequest

Item = RequestOutput | InfcError

MAX_UNREAD = 64
"""Outputs that a slow reader may leave lying; what comes beyond them is joined to the last."""


@dataclass(slots=True, eq=False)
class Stream:
    """One caller: its request, and its outputs that nobody has read yet.

    `is_lost` is set where an output could not be handed over: nothing more is, and whoever looks
    after streams tells the caller.
    """

    request: PreparedRequest
    loop: asyncio.AbstractEventLoop
    is_lost: bool = False
    unread: deque[Item] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request_id(self) -> str:
        """The name of the request."""
        return self.request.request.request_id

    def put(self, item: Item) -> None:
        """Take an output in; on the loop's thread."""
        last = self.unread[-1] if len(self.unread) >= MAX_UNREAD else None
        if isinstance(last, RequestOutput) and isinstance(item, RequestOutput):
            self.unread[-1] = merge_outputs([last, item])
        else:
            self.unread.append(item)
        self.arrived.set()

    def fail(self, error: InfcError) -> None:
        """Take an error in, where nothing else is left to read."""
        if not self.unread:
            self.put(error)

    async def get(self) -> Item:
        """The next output, as soon as there is one."""
        while not self.unread:
            self.arrived.clear()
            await self.arrived.wait()
        return self.unread.popleft()


def hand_over(items: Sequence[tuple[Stream, Item]]) -> list[Stream]:
    """Put each output into its stream, with one wake-up a loop; the streams that are lost now.

    That is where memory is short, or a loop closed: then nobody listens any more. Raises nothing.
    """
    lost: list[Stream] = []
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}
    try:
        for stream, item in items:
            if not stream.is_lost:  # what it lacks would be missing in its middle
                by_loop.setdefault(stream.loop, []).append((stream, item))
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


def _deliver(items: Sequence[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.put(item)
