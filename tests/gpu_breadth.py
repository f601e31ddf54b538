"""How much of the tests for GPUs runs: CI runs a part of what takes long, `make test-gpu` all."""

from __future__ import annotations

import os
from typing import Final

import pytest

RARELY: Final = (
    pytest.mark.breadth,
    pytest.mark.skipif(
        os.environ.get("INFC_TEST_GPU") != "all", reason="one of many: run make test-gpu"
    ),
)
"""Marks of what CI leaves out too: another chip, kind or scheme of what others show."""
