"""Memory that is kept back, and an event loop that outlives moments without any."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from infc.runtime import memory_reserve
from infc.runtime.faults import note_fault
from infc.runtime.memory_reserve import LITTLE_BYTES, RESERVE, MemoryReserve
from infc.runtime.server.event_loop import SturdyEventLoop


class Machine:
    """Has so much memory left; counts only what goes through here."""

    def __init__(self, left: int) -> None:
        self.left = left

    def map(self, file: int, size: int, *flags: Any) -> mmap.mmap:
        if size > self.left:
            raise OSError(12, "Cannot allocate memory")
        return mmap.mmap(file, size, *flags)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(1 << 40)
    stand_in = SimpleNamespace(mmap=machine.map, MAP_PRIVATE=mmap.MAP_PRIVATE)
    monkeypatch.setattr(memory_reserve, "mmap", stand_in)
    return machine


@pytest.fixture
def kept() -> Iterator[None]:
    """The reserve of the process, and it is as it was afterwards."""
    was = RESERVE.is_kept
    assert RESERVE.keep()
    yield
    RESERVE.keep() if was else RESERVE.free()


def test_it_is_freed_where_little_is_left_and_kept_again_where_there_is_more(
    machine: Machine,
) -> None:
    reserve = MemoryReserve(1 << 20)
    assert not reserve.is_kept
    reserve.ease()
    assert reserve.keep() and reserve.keep() and reserve.is_kept
    reserve.ease()
    assert reserve.is_kept, "there is enough"
    machine.left = LITTLE_BYTES - 1
    reserve.ease()
    assert not reserve.is_kept
    assert not reserve.keep(), "there is room for it, and for nothing beside it"
    machine.left = 0
    assert not reserve.keep()
    machine.left = LITTLE_BYTES
    assert reserve.keep()
    reserve.free()
    reserve.free()
    assert not reserve.is_kept


def test_a_fault_without_memory_frees_it(kept: None, caplog: pytest.LogCaptureFixture) -> None:
    note_fault("something", ValueError())
    assert RESERVE.is_kept
    note_fault("something", MemoryError())
    assert not RESERVE.is_kept
    assert "something failed" in caplog.text


@pytest.mark.parametrize("where", ["callback", "loop"])
def test_a_loop_goes_on(where: str, kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a callback has no memory, or the loop itself."""
    left = 3

    def fail(*_: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            raise MemoryError

    async def test() -> int:
        loop = asyncio.get_running_loop()
        if where == "callback":
            loop.call_soon(fail)
        else:
            select = loop._selector.select  # type: ignore[attr-defined]

            def failing(timeout: float | None = None) -> Any:
                fail()
                return select(timeout)

            monkeypatch.setattr(loop._selector, "select", failing)  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)
        return await asyncio.to_thread(lambda: 7)

    with asyncio.Runner(loop_factory=SturdyEventLoop) as runner:
        assert runner.run(test()) == 7
    assert left < 3
    assert not RESERVE.is_kept
