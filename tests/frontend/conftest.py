"""Tests of the frontend trace each model for themselves."""

from collections.abc import Iterator

import pytest

from infc.frontend import load

from ..captures import Captures


@pytest.fixture(scope="module", autouse=True)
def trace(captures: Captures) -> Iterator[None]:
    """Nothing is shared here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_capture", captures.capture)
        yield
