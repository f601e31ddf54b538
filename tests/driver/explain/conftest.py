"""The bundled model's programs, captured once for all tests of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from infc.driver.explain.collect import inspect_artifact
from infc.driver.explain.facts import ArtifactFacts
from infc.ir.program import Program

from .support import MEMORY, capture_tiny, write_explained


@pytest.fixture(scope="session")
def captured() -> Program:
    """The bundled model as it is captured."""
    return capture_tiny()


@pytest.fixture(scope="session")
def tiny(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the bundled model."""
    return write_explained(tmp_path_factory.mktemp("explain") / "tiny", captured)


@pytest.fixture(scope="session")
def facts(tiny: Path) -> ArtifactFacts:
    """Its facts, for a memory that doesn't depend on the machine."""
    return inspect_artifact(tiny, memory=MEMORY)
