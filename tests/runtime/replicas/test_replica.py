"""One replica whose process cannot be started, or whose owner fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from infc.ir.errors import InfcError
from infc.runtime.engine import EngineStats
from infc.runtime.replicas import child as child_module
from infc.runtime.replicas import memory_watch
from infc.runtime.replicas import replica as replica_module
from infc.runtime.replicas.child import (
    Child,
    Start,
    death_of,
    num_killed_for_memory,
    start_engine,
)
from infc.runtime.replicas.memory_watch import MemoryWatch
from infc.runtime.replicas.messages import VERSION, Open, Opening, Ready, Stats, Told
from infc.runtime.replicas.replica import Replica

from .test_suspects import SLEEPING, NoOwner


def starting(failures: list[Exception]) -> Start:
    """Starts processes, after it has failed with each of these."""

    def start() -> Child:
        if failures:
            raise failures.pop(0)
        return start_engine(SLEEPING)

    return start


def replica_of(start: Start, owner: NoOwner | None = None) -> Replica:
    return Replica(0, Open(VERSION, "", "", {}), start, owner or NoOwner())


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("error", [OSError(24, "too many"), MemoryError(), RuntimeError("x")])
def test_a_start_that_fails_is_tried_again(error: Exception) -> None:
    async def run() -> None:
        replica = replica_of(starting([error]))
        await replica.start()
        assert (replica.state, replica.pid) == ("waiting", None)
        await eventually(lambda: replica.state == "starting")
        await replica.close(0)

    asyncio.run(run())


def test_files_may_run_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that has worked is not given up for it."""
    monkeypatch.setattr(replica_module, "_FIRST_DELAY_SECONDS", 0.001)

    async def run(was_ready: bool) -> str:
        replica = replica_of(starting([OSError(24, "too many")] * 8))
        replica._was_ready = was_ready
        await replica.start()
        await eventually(lambda: replica.state in ("starting", "given up"))
        state = replica.state
        await replica.close(0)
        return state

    assert asyncio.run(run(True)) == "starting"
    assert asyncio.run(run(False)) == "given up"


def test_a_process_that_does_not_begin_to_open_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be stopped; opening itself may take much longer."""
    monkeypatch.setattr(replica_module, "_IMPORT_SECONDS", 2.0)

    async def run() -> None:
        replica = replica_of(starting([]))
        replica._was_ready = True
        await replica.start()
        first = replica.pid
        replica.check_silence(replica.heard_at + 1.0, 60)
        assert replica.pid == first
        replica.check_silence(replica.heard_at + 2.1, 60)
        await eventually(lambda: replica.state == "starting" and replica.pid != first)
        replica._hear(Opening())
        second = replica.pid
        replica.check_silence(replica.heard_at + 100.0, 60)
        await asyncio.sleep(0.1)
        assert (replica.state, replica.pid) == ("opening", second)
        assert replica.glance().state == "starting"
        await replica.close(0)

    asyncio.run(run())


def test_counts_never_fall() -> None:
    """They are those of all processes of a replica."""

    async def run() -> None:
        replica = replica_of(starting([]))
        await replica.start()
        for total in (3, 6):
            await eventually(lambda: replica.state == "starting" and replica.pid is not None)
            replica._hear(Told(stats=Stats(1, 2, 5, 9, 3, 30, 0)))
            assert replica.stats == EngineStats(1, 2, 5, 9, total, 10 * total)
            replica._kill()
            await eventually(lambda: replica.state == "waiting" and replica.pid is None)
            assert replica.stats == EngineStats(0, 0, 0, 0, total, 10 * total)
        await replica.close(0)

    asyncio.run(run())


def test_an_engine_that_is_killed_has_a_successor_at_once() -> None:
    """Also before it has done anything, and again and again; one that fails waits."""

    async def run() -> None:
        replica = replica_of(starting([]))
        await replica.start()
        for _ in range(3):
            await eventually(lambda: replica.state == "starting" and replica.pid is not None)
            replica._hear(Ready(VERSION, ""))
            replica._kill()
            await eventually(lambda: replica.state == "starting" and replica.pid is not None)
        assert replica._num_failed_starts == 0
        replica._hear(Ready(VERSION, ""))
        replica._failure = InfcError("no such luck")
        replica._kill()
        await eventually(lambda: replica.state == "waiting" and replica.pid is None)
        assert replica._num_failed_starts == 1
        await replica.close(0)

    asyncio.run(run())


def test_the_kernel_may_have_run_out_of_memory_long_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And killed something else, some seconds before somebody kills the engine."""

    async def run() -> tuple[bool, bool]:
        replica, watch = replica_of(starting([])), MemoryWatch()
        await replica.start()
        killed = num_killed_for_memory() + 1
        for module in (memory_watch, child_module):
            monkeypatch.setattr(module, "num_killed_for_memory", lambda: killed)
        assert replica._child is not None
        replica._child.kill()
        replica._child.process.wait()
        watch.look([replica])
        soon = death_of(replica._child)
        watch._looked_at -= 5
        watch.look([replica])
        just_now = death_of(replica._child)
        watch._looked_at -= 5
        watch.look([replica])
        later = death_of(replica._child)
        await replica.close(0)
        assert soon.is_blamed
        return just_now.is_blamed, later.is_blamed

    assert asyncio.run(run()) == (True, False)


def test_a_process_without_a_connection_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        children: list[Child] = []

        def start() -> Child:
            children.append(start_engine(SLEEPING))
            return children[-1]

        async def fail(*arguments: Any, **options: Any) -> None:
            monkeypatch.undo()
            raise OSError(12, "no memory")

        monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", fail)
        replica = replica_of(start)
        await replica.start()
        assert children[0].process.returncode is not None
        await eventually(lambda: replica.state == "starting")
        await replica.close(0)

    asyncio.run(run())


def test_an_owner_that_fails_leaves_no_replica_behind() -> None:
    class Failing(NoOwner):
        def on_death(self, replica: Replica, death: Any, interrupted: Any) -> None:
            raise MemoryError

    async def run() -> None:
        replica = replica_of(starting([]), Failing())
        await replica.start()
        first = replica.pid
        replica._kill()
        await eventually(lambda: replica.state == "starting" and replica.pid != first)
        assert replica.pid is not None
        await replica.close(0)

    asyncio.run(run())
