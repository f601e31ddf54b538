"""Threads beside the event loop: whom they refuse, and what they survive."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from infc.runtime.server.errors import ApiError
from infc.runtime.server.workers import Workers


def test_one_more_than_may_wait_is_refused_and_without_a_limit_nobody() -> None:
    async def run(max_waiting: int | None) -> list[Any]:
        workers, gate = Workers(max_waiting), threading.Event()
        calls = [asyncio.create_task(workers.run(gate.wait)) for _ in range(8)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    refused = [isinstance(one, ApiError) for one in asyncio.run(run(2))]
    assert any(refused) and not all(refused)
    assert asyncio.run(run(None)) == [True] * 8


def test_no_place_is_lost_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> int:
        workers = Workers(4)
        with monkeypatch.context() as patch:
            patch.setattr(workers._pool, "submit", refuse)
            for _ in range(4):
                with pytest.raises(RuntimeError, match="new thread"):
                    await workers.run(int)
            workers.start(lambda: None)  # what nobody waits for raises nothing
        return await asyncio.wait_for(workers.run(lambda: 7), 5)

    assert asyncio.run(run()) == 7
