"""The engine of one replica: requests of fronts in, and what steps gave out, as messages."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from ...ir.errors import ArtifactError, InfcError
from ...runtime.async_engine import AsyncEngine
from ...runtime.async_streams import Reader
from ...runtime.engine import Engine
from ...runtime.faults import note_fault
from ...runtime.options import RuntimeOptions
from ...runtime.replicas.block_news import BlockNews
from ...runtime.replicas.frames import FrameError
from ...runtime.replicas.messages import (
    VERSION,
    Add,
    Failed,
    Report,
    Stats,
    Told,
    added_of,
    failure_of,
    params_from_data,
    payload_of,
    report_of,
    to_engine,
)
from ...runtime.replicas.prefixes import DIGEST_BYTES
from ...runtime.requests.outputs import RequestOutput
from ...runtime.requests.resumption import Resumption
from ...runtime.scheduling.kv_groups import common_block_size
from ...runtime.scheduling.owners import StepTimes
from .described import Described
from .placing import DIGESTS
from .same_artifact import open_same

BEAT_SECONDS = 1.0
"""An engine that is not in a step that hangs says something of each request at least so often."""

_MOST_DIGESTS = 8192
_MOST_REPORTS = 4096
_STATS_SECONDS = 0.25
_LOG = logging.getLogger("infc.runtime")


class EngineReplica:
    """What Ray makes an actor of. Its methods run on one event loop, and the engine on a thread."""

    def __init__(
        self, path: str, identity: str, options: dict[str, Any], hang_seconds: float
    ) -> None:
        artifact = open_same(path, identity)
        weights = artifact.verify_weights()
        engine = Engine.open(artifact, RuntimeOptions(**options))
        weights.result()
        for note in engine.plan.notes:
            _LOG.warning("note: %s", note)
        self._identity = identity
        self._hang_seconds = hang_seconds
        self._news = BlockNews(engine)
        self._blocks: dict[bytes, None] = {}
        self._lock = threading.Lock()  # guards `_blocks`
        self._reports: deque[Report] = deque(maxlen=_MOST_REPORTS)
        self._stats_at = 0.0
        self._engine = AsyncEngine(engine)
        self._engine.watch_steps(self._on_step)
        self._seen = (0, time.monotonic())

    # --- for fronts ---------------------------------------------------------------------------

    async def describe(self) -> Described:
        """What fronts need to know of the engine."""
        plan = self._engine.engine.plan
        return Described(plan.limits.max_context, common_block_size(plan.groups))

    async def answer(
        self, payload: bytes, version: int, identity: str
    ) -> AsyncGenerator[bytes, None]:
        """What steps add to a request, from `Add` on; closing the generator ends the request."""
        try:
            reader = await self._begin(payload, version, identity)
        except InfcError as error:
            yield payload_of(Failed(failure_of(error)))
            return
        is_first, steps = True, -1
        next_one: asyncio.Task[tuple[int, RequestOutput]] | None = None
        try:
            while reader.num_open:
                next_one = next_one or asyncio.ensure_future(reader.get())
                done, _ = await asyncio.wait({next_one}, timeout=BEAT_SECONDS)
                if not done:
                    before, steps = steps, self._engine.engine.num_steps
                    if steps != before:
                        yield payload_of(Told())
                    continue
                got, next_one = next_one, None
                _, output = got.result()
                yield payload_of(self._told(output, is_first=is_first))
                is_first = False
        except InfcError as error:
            self._end_if_lost()
            yield payload_of(Failed(failure_of(error)))
        finally:
            if next_one is not None:
                next_one.cancel()
            reader.close()

    async def _begin(self, payload: bytes, version: int, identity: str) -> Reader:
        if version != VERSION or identity != self._identity:
            raise ArtifactError(
                "the application was deployed again with another artifact or version of infc",
                hint="send the request again",
            )
        message = to_engine(payload)
        if not isinstance(message, Add):
            raise FrameError("a front sent something else than a request")
        resumed = message.resumed
        try:
            return await self._engine.read(
                [message.prompt],
                params_from_data(message.params),
                priority=message.priority,
                cache_salt=message.cache_salt,
                whole=message.is_whole,
                resumed=[None if resumed is None else Resumption.from_data(resumed)],
            )
        except InfcError:
            self._end_if_lost()
            raise
        except Exception as error:
            raise InfcError(note_fault("preparing a request", error)) from None

    def _told(self, output: RequestOutput, *, is_first: bool) -> Told:
        added = added_of(0, output, with_times=is_first or output.finished)
        reports = []
        while self._reports:
            reports.append(self._reports.popleft())
        stats, now = None, time.monotonic()
        if now - self._stats_at > _STATS_SECONDS or output.finished:
            self._stats_at, s = now, self._engine.stats()
            stats = Stats(
                s.num_waiting,
                s.num_running,
                s.num_free_blocks,
                s.num_blocks,
                s.num_preemptions,
                s.num_steps,
                s.num_waiting,
            )
        return Told((added,), reports=tuple(reports), stats=stats)

    def _end_if_lost(self) -> None:
        """End the process of an engine that has stopped: its requests are continued elsewhere."""
        if self._engine.error is not None:
            _LOG.error("the engine failed, and its process ends: %s", self._engine.error)
            os._exit(1)

    # --- for Ray ------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raises an error where the engine has stopped, or is in a step for too long."""
        self._end_if_lost()
        steps, now = self._engine.engine.num_steps, time.monotonic()
        if steps != self._seen[0] or not self._engine.num_pending:
            self._seen = (steps, now)
        elif now - self._seen[1] > self._hang_seconds:
            raise InfcError(f"a step has taken more than {self._hang_seconds:g} s")

    def record_routing_stats(self) -> dict[str, bytes]:
        """The digests of the newest blocks in the prefix cache, for routers."""
        with self._lock:
            digests = list(self._blocks)[-_MOST_DIGESTS:]
        return {DIGESTS: b"".join(digests)}

    # --- on the engine's thread ---------------------------------------------------------------

    def _on_step(self, times: StepTimes) -> None:
        self._reports.append(report_of(times))
        stored, removed = self._news.take()
        if stored or removed:
            with self._lock:
                for digest in removed:
                    self._blocks.pop(digest, None)
                for digest in stored:
                    assert len(digest) == DIGEST_BYTES
                    self._blocks[digest] = None
