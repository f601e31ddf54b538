"""The kernels under test: every target this machine can run, both element types."""

import pytest

from .harness import DTYPES, TARGETS, Kernels, kernels


# For the session, so that tests run in the order of what they need compiled: two workers then
# seldom wait for the same.
@pytest.fixture(
    scope="session", params=[(t, d) for t in TARGETS for d in DTYPES], ids=lambda p: "-".join(p)
)
def k(request: pytest.FixtureRequest) -> Kernels:
    """The kernels for one target and element type."""
    return kernels(*request.param)


@pytest.fixture(scope="session", params=TARGETS)
def float_kernels(request: pytest.FixtureRequest) -> Kernels:
    """The kernels for float alone, with the elementary functions."""
    return kernels(request.param, "float")
