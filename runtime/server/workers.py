"""Threads for what takes too long for the event loop: parsing, templates, tokens, long answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from .errors import ApiError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_THREADS = 2  # each that computes makes the event loop wait for the interpreter's lock


class Workers:
    """Runs calls on a few threads; `max_waiting` may wait for one, one more gets 429.

    What waits, waits on the event loop: whoever is cancelled gives up their place, and whatever
    they hold, at once.
    """

    def __init__(self, max_waiting: int | None) -> None:  # None: nobody is refused
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="infc-server")
        self._free = asyncio.Semaphore(_THREADS)
        self._max_waiting = max_waiting
        self._num_waiting = 0

    async def run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What the call returns or raises. Raises ApiError where too many calls wait."""
        if self._max_waiting is not None and self._num_waiting >= self._max_waiting:
            raise ApiError(
                429, "too many requests are being prepared", code="queue_full", retry_seconds=1
            )
        self._num_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._num_waiting -= 1
        loop = asyncio.get_running_loop()
        try:
            future = self._pool.submit(call, *args, **kwargs)
        except BaseException:  # no memory, or no further thread
            self._free.release()
            raise

        def release(_: Future[_T]) -> None:  # also after the caller was cancelled
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._free.release)

        future.add_done_callback(release)
        return await asyncio.wrap_future(future)

    def start(self, call: Callable[[], None]) -> None:
        """Runs a call that nobody waits for, after those that are running."""
        with contextlib.suppress(RuntimeError, MemoryError):  # no further thread, or no memory
            self._pool.submit(call)
