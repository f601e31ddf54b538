"""Tensors of a GGUF file as they lie: the codes stand for what the format's documentation says."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from infc.frontend.sources.gguf.tensors import GgufTensors
from infc.ir.errors import CheckpointError
from infc.ir.formats import GGUF_FORMATS
from infc.ir.types import DType

from ..gguf_files import finish

KINDS = [GGMLQuantizationType[name.upper()] for name in GGUF_FORMATS]


def write(path: Path, raw: np.ndarray, kind: GGMLQuantizationType) -> GgufTensors:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("one", raw, raw_dtype=kind)
    finish(writer)
    return GgufTensors(path)


def random_blocks(
    kind: GGMLQuantizationType, shape: tuple[int, ...], blocks: int, seed: int
) -> np.ndarray:
    """Any bytes, but finite scales and minima: of either sign, zero, and below the normal range."""
    form, rng = GGUF_FORMATS[kind.name.lower()], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape, blocks, form.block_bytes), dtype=np.uint8)
    for part in form.parts:
        if part.dtype is DType.F16:
            raw[..., part.offset + 1] &= 0xBB  # no exponent of all ones
    return raw.reshape(*shape, -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@given(
    lead=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 1 << 16),
)
def test_codes_are_the_documented_values(
    kind: GGMLQuantizationType, lead: list[int], blocks: int, seed: int
) -> None:
    raw = random_blocks(kind, tuple(lead), blocks, seed)
    with tempfile.TemporaryDirectory() as place:
        tensors = write(Path(place) / "one.gguf", raw, kind)
        codes = tensors.packed("one")
        form = GGUF_FORMATS[str(tensors.stored("one"))]
        assert codes.dtype is torch.uint8
        assert tuple(codes.shape) == form.code_type(tensors.types["one"]).shape
        values = form.decode(codes, torch.ones(codes.shape[:-1]), blocks * form.group)
        expected = gguf.quants.dequantize(raw, kind)
        # Bit for bit, and -0.0 is a number like 0.0: products of both are the same.
        assert np.array_equal(values.numpy(), expected)
        assert torch.equal(values, tensors.tensor("one"))


@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E01])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_scales_that_are_no_numbers_are_named(
    kind: GGMLQuantizationType, bad: int, tmp_path: Path
) -> None:
    form = GGUF_FORMATS[kind.name.lower()]
    for part in form.parts:
        if part.dtype is DType.F16:
            raw = random_blocks(kind, (3,), 2, 0)
            at = form.block_bytes + part.offset
            raw[1, at : at + 2] = bad & 0xFF, bad >> 8
            tensors = write(tmp_path / f"{part.name}.gguf", raw, kind)
            with pytest.raises(CheckpointError, match=rf"tensor one: a {part.name} of its blocks"):
                tensors.packed("one")


def test_what_is_not_packed_is_refused(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q5_0
    raw = np.zeros((2, GGML_QUANT_SIZES[kind][1]), np.uint8)
    tensors = write(tmp_path / "one.gguf", raw, kind)
    for name in ("one", "two"):
        with pytest.raises(CheckpointError, match=f"has no packed tensor {name}"):
            tensors.packed(name)
