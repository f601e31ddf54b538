"""What all tests of the runtime share."""

from __future__ import annotations

import pytest

from infc.runtime.memory_plan import MemoryBroker


@pytest.fixture(autouse=True)
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    """One that knows of no engine of other tests, whose plans would make memory less."""
    fresh = MemoryBroker()
    for module in ("opened_parts", "limits"):
        monkeypatch.setattr(f"infc.runtime.{module}.BROKER", fresh)
    return fresh
