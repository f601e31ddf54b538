"""What tests of kernels share."""

import os

import pytest

from ...e2e.builds import Builds


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """The checkpoints and artifacts of this run; its workers have one directory for all."""
    root = tmp_path_factory.getbasetemp()
    return Builds((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "builds")
