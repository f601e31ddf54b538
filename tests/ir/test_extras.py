"""Libraries that may be missing: asked for as modules, as they are imported."""

from __future__ import annotations

import pytest

from infc.ir.errors import ToolchainError
from infc.ir.extras import Extra


def test_modules_are_looked_for_not_distributions() -> None:
    here, absent = (
        ("json", "json.decoder"),
        ("no_such", "no_such.part", "json.no", "json.decoder.no"),
    )
    extra = Extra((*here, *absent), "pip install it")
    assert extra.missing() == list(absent)
    with pytest.raises(ToolchainError, match=r"this needs no_such, .* .pip install it"):
        extra.require("this")
    Extra(here, "").require("this")
