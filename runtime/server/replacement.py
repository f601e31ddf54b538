"""The artifact that is served, and another one in its place while answers are under way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from ...ir.errors import InfcError
from ...ir.sizes import format_count
from ..faults import note_fault
from ..log import ServerLog
from .interpreter import collect_whole, leave_out_of_collections
from .served import ServedEngine
from .settings import ServerSettings

if TYPE_CHECKING:
    from .metrics import ServerMetrics

_T = TypeVar("_T")

_END_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Served:
    """One artifact with its engine, and the application that answers with it.

    `info` is what `/metrics` calls it, `num_open` counts the requests that are being answered.
    """

    identity: str
    info: dict[str, str]
    app: ASGIApp
    engine: ServedEngine
    settings: ServerSettings
    metrics: ServerMetrics
    num_open: int = 0


class Replaceable:
    """The application of the artifact that is served now: what begins with one ends with it.

    `open_next` opens what is to be served instead, on a thread of its own. None means that there
    is nothing else; errors of infc say why there is nothing that can be served.
    """

    def __init__(
        self, first: Served, open_next: Callable[[Served], Served | None], log: ServerLog
    ) -> None:
        self._now = first
        self._before: list[Served] = []  # whose answers have not ended
        self._open_next = open_next
        self._log = log
        self._is_asked = self._is_replacing = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, with whatever is served as it begins."""
        served = self._now
        served.num_open += 1
        try:
            await served.app(scope, receive, send)
        finally:
            served.num_open -= 1
            self._end_if_done(served)

    # --- for the server -----------------------------------------------------------------------

    @property
    def num_pending(self) -> int:
        """Requests that engines have taken and that have not ended."""
        return sum(served.engine.num_pending for served in (*self._before, self._now))

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Fail what is pending, and end all engines."""
        for served in (*self._before, self._now):
            served.engine.shutdown(timeout_seconds)

    def replace(self) -> None:
        """Serve what is there now, on the event loop. Asked again meanwhile, it looks once more."""
        self._is_asked = True
        if not self._is_replacing:
            self._is_replacing = True
            self._begin(self._replace())

    # --- one replacement ----------------------------------------------------------------------

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # a task that nobody holds may be collected
        task.add_done_callback(self._tasks.discard)

    async def _replace(self) -> None:
        try:
            while self._is_asked:
                self._is_asked = False
                await self._replace_once()
        finally:
            self._is_replacing = False

    async def _replace_once(self) -> None:
        try:
            following = await _beside(lambda: self._open_next(self._now))
        except InfcError as error:
            self._refuse(str(error))
        except Exception as error:
            self._refuse(note_fault("opening another artifact", error))
        else:
            if following is not None:
                self._take(following)

    def _refuse(self, reason: str) -> None:
        text = f"error: the artifact is not replaced, and served further: {reason}"
        self._log.event("not_replaced", text, level="error", reason=reason)

    def _take(self, following: Served) -> None:
        before, self._now = self._now, following
        self._before.append(before)
        following.metrics.follow(following.engine, following.info)
        leave_out_of_collections()
        name, count = following.info["model_name"], before.num_open
        rest = f"; {format_count(count, 'answer')} of the one before to finish" if count else ""
        self._log.event(
            "replaced",
            f"replaced: {name} is served from artifact {following.identity[:12]} now{rest}",
            model=name,
            artifact=following.identity,
            artifact_before=before.identity,
            pending=count,
        )
        self._end_if_done(before)

    def _end_if_done(self, served: Served) -> None:
        """Give up the engines of an artifact that has no requests any more, and gets no others."""
        if served.num_open == 0 and served in self._before:
            self._before.remove(served)
            self._begin(self._end(served))

    async def _end(self, served: Served) -> None:
        identity, engine = served.identity, served.engine
        await _beside(partial(engine.shutdown, _END_SECONDS))
        served.metrics.leave(engine)
        del served, engine
        collect_whole()
        self._log.event(
            "ended",
            f"the engines of artifact {identity[:12]} have ended",
            artifact=identity,
        )


async def _beside(work: Callable[[], _T]) -> _T:
    """What it gives, on a thread that nobody waits for when the server ends."""
    future: Future[_T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="infc-replace", daemon=True).start()
    return await asyncio.wrap_future(future)
