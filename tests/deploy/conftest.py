"""The bundled model, compiled for this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

import infc


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the bundled model."""
    recipe = Path(__file__).resolve().parents[2] / "recipes/tiny/model.yaml"
    output = tmp_path_factory.mktemp("deployed") / "tiny.infc"
    infc.compile(recipe, output=output, verify=False, progress=False)
    return output
