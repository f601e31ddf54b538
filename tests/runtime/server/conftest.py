"""One server for the tests that leave it as it was."""

from collections.abc import Iterator

import pytest

from .serving import Serving, serving


@pytest.fixture(scope="package")
def _shared() -> Iterator[Serving]:
    with serving() as server:
        yield server


@pytest.fixture
def server(_shared: Serving) -> Iterator[Serving]:
    """The shared server; whatever a test did, no request and no block is left behind."""
    yield _shared
    _shared.wait_until_empty()
