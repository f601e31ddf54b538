"""What the driver's tests share: a cache of their own, and runs of the command line."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees what another, or the user, compiled."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.delenv("INFC_CACHE_LIMIT", raising=False)
    monkeypatch.delenv("INFC_DEBUG", raising=False)
    return place / "infc"
