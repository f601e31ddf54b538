"""Tensors kept in a file without a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infc.ir.errors import CheckpointError, UsageError
from infc.passes.methods.spill import SpillFile


def test_a_spill_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    spill = SpillFile(tmp_path)
    tensors = {
        "bytes": torch.arange(17, dtype=torch.uint8).reshape(1, 17),
        "none": torch.empty(0, 4),
        "scales": torch.randn(3, 5).T,
    }
    for key, tensor in tensors.items():
        spill.write(key, tensor)
    for key, tensor in tensors.items():
        assert torch.equal(spill.read(key), tensor)
        assert spill.read(key).dtype == tensor.dtype
    with pytest.raises(CheckpointError, match="no method has made"):
        spill.read("other")
    assert list(tmp_path.iterdir()) == []
    spill.close()


def test_a_spill_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be kept"):
        SpillFile(tmp_path / "gone").write("x", torch.zeros(1))
