"""What tests of models in ONNX share: builds of them, and memory that was never written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infc.runtime.executors.onnxruntime_pools import Pools

from .builds import Build

BOUND = 1e-5
"""Of the largest logit of a row, in float32."""
SLOTS = {"onnx.kv": "slots"}
OWN = {"onnx.dialect": "onnxruntime"}
"""What a recipe may say of caches and ops."""


def onnx(build: Build, **sets: Any) -> Build:
    """The same model in ONNX."""
    return replace(build, backend="onnx", sets=(*build.sets, *sets.items()))


def reference(build: Build) -> Build:
    """What it is compared with."""
    return replace(build, backend="reference")


def poison(patch: pytest.MonkeyPatch) -> None:
    """Keys and values that no step has written are NaN."""
    make = Pools.__init__

    def filled(pools: Pools, *args: Any) -> None:
        make(pools, *args)
        for pool in pools.arrays.values():
            pool.fill(np.nan if pool.dtype == np.float32 else 0x7FFF)

    patch.setattr(Pools, "__init__", filled)
