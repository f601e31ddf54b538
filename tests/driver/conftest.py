"""What the driver's tests share: a cache of their own, runs of the command line, a small model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .compiling import RECIPE

if TYPE_CHECKING:
    from infc.ir.artifact import Artifact


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # for fixtures that outlive a test
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("session-cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees what another, or the user, compiled."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.delenv("INFC_CACHE_LIMIT", raising=False)
    monkeypatch.delenv("INFC_DEBUG", raising=False)
    return place / "infc"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside a small checkpoint."""
    from ..checkpoints import make_checkpoint

    place = tmp_path_factory.mktemp("source")
    make_checkpoint("llama", place / "checkpoint", tokenizer=True, num_hidden_layers=2)
    (place / "model.yaml").write_text(RECIPE)
    return place


@pytest.fixture(scope="session")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """That model by the backend reference."""
    import infc

    output = tmp_path_factory.mktemp("out") / "small"
    return infc.compile(source / "model.yaml", output, cache=False)


@pytest.fixture(scope="session")
def fast(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same model by the cpp backend, for this machine."""
    import infc

    output = tmp_path_factory.mktemp("cpp") / "fast"
    overrides = ["backend=cpp", "target=native"]
    return infc.compile(source / "model.yaml", output, overrides=overrides, cache=False)
