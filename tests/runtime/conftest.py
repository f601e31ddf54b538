"""What all tests of the runtime share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infc.runtime.memory_plan import MemoryBroker


@pytest.fixture(autouse=True)
def broker() -> Iterator[MemoryBroker]:
    """One that knows of no engine of other tests, whose plans would make memory less.

    Not by the fixture `monkeypatch`, whose changes a test may have to undo before others end.
    """
    fresh = MemoryBroker()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("opened_parts", "limits"):
            patch.setattr(f"infc.runtime.{module}.BROKER", fresh)
        yield fresh
