"""Matrices for GPUs are rounded by compiled code, too, to the same bits."""

from __future__ import annotations

import pytest
import torch

from infc.codegen.registry import get_backend
from infc.ir.schemes import get_scheme


@pytest.mark.parametrize("scheme", ["int4", "int4-weights", "int8"])
def test_compiled_code_rounds_matrices_for_gpus(scheme: str) -> None:
    matrix = torch.randn(70, 200, generator=torch.Generator().manual_seed(4)).bfloat16()
    said: list[str] = []
    with get_backend("triton").rounding(said.append) as compiled:
        found = compiled.nearest[scheme](matrix)
        assert scheme in compiled.feedback
    for one, wanted in zip(found, get_scheme(scheme).quantize(matrix), strict=True):
        assert torch.equal(one, wanted)
    assert not said, "there is a compiler"
