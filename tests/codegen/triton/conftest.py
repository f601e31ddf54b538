"""What tests of kernels share."""

import os
from collections.abc import Iterator

import pytest

from infc.codegen.triton import aot

from ...conftest import kept
from ...e2e.builds import Builds
from .interpreting import Interpreting


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """The checkpoints and artifacts of this run; its workers have one directory for all."""
    root = tmp_path_factory.getbasetemp()
    return Builds((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "builds")


@pytest.fixture(scope="session")
def interpreting() -> Iterator[Interpreting]:
    """A process of Triton's interpreter."""
    process = Interpreting()
    yield process
    process.close()


@pytest.fixture(autouse=True)
def _kept_kernels(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests compile is kept from run to run."""
    monkeypatch.setattr(aot, "kept_kernels", lambda: kept(pytestconfig, "triton"))
