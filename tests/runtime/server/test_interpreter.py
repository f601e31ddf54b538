"""The interpreter while it serves: short collections, and a lock that changes hands often."""

from __future__ import annotations

import gc
import socket
import sys
from typing import cast

import pytest
import uvicorn

from infc.runtime.async_engine import AsyncEngine
from infc.runtime.server import process
from infc.runtime.server.settings import ServerSettings


def test_it_holds_while_the_server_runs_and_not_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(server: uvicorn.Server, sockets: object) -> None:
        seen.append((gc.get_freeze_count() > 1000, sys.getswitchinterval() < 0.001))

    async def app(*_: object) -> None:
        pytest.fail("nobody asks it for anything")

    engine = cast("AsyncEngine", object())
    before = sys.getswitchinterval()
    monkeypatch.setattr(process._Server, "run", run)
    with socket.socket() as listener:
        process.run_server(app, listener, engine, ServerSettings(model_names=("a",)))
    assert seen == [(True, True)]
    # Whatever was left out before, by a command in this process for example.
    assert (gc.get_freeze_count(), sys.getswitchinterval()) == (0, before)
