"""e4m3: which numbers bytes stand for, how numbers are rounded to them, and scales."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from infc.ir.e4m3 import (
    E4M3_LEVELS,
    LARGEST_E4M3,
    NAN_E4M3,
    decode_e4m3,
    encode_e4m3,
    quantize_e4m3,
    quantize_e4m3_groups,
    quantize_e4m3_matrix,
    quantize_e4m3_rows,
    quantize_e4m3_tiles,
)

FINITE = sorted({level for level in E4M3_LEVELS if not math.isnan(level)})


def of_torch(values: torch.Tensor) -> torch.Tensor:
    """What torch's own conversion gives, of numbers that it does not make NaN."""
    limited = values.float().clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return limited.to(torch.float8_e4m3fn).view(torch.uint8)


def random(seed: int, *shape: int, spread: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator)
    return rows * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))


def test_bytes_stand_for_the_numbers_of_torch() -> None:
    codes = torch.arange(256).to(torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(decode_e4m3(codes), expected, rtol=0, atol=0, equal_nan=True)
    assert decode_e4m3(codes)[[NAN_E4M3, 0xFF]].isnan().all()
    assert len(FINITE) == 253 and FINITE[-1] == LARGEST_E4M3  # two of 254 are zeros
    numbers = codes[codes & 0x7F != NAN_E4M3]
    assert torch.equal(encode_e4m3(decode_e4m3(numbers)), numbers)


@pytest.mark.parametrize("widened", [None, torch.float64], ids=["as it is", "in float64"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_rounded_as_torch_does(
    dtype: torch.dtype, widened: torch.dtype | None
) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()]
    assert torch.equal(encode_e4m3(values.to(widened or dtype)), of_torch(values))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
@example([448.0, 464.0, 480.0, 1e30, math.inf, -math.inf, 2.0**-10, 3 * 2.0**-10, -0.0])
def test_the_nearest_is_taken_and_nothing_becomes_nan(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    codes = encode_e4m3(values)
    assert torch.equal(codes, of_torch(values))
    assert torch.equal(codes, encode_e4m3(values.double()))
    for value, code in zip(values.tolist(), codes.tolist(), strict=True):
        found = E4M3_LEVELS[code]
        least = min(abs(min(max(value, -448.0), 448.0) - level) for level in FINITE)
        assert abs(min(max(value, -448.0), 448.0) - found) == least
        assert math.copysign(1, found) == math.copysign(1, value)


def test_ties_go_to_the_even_mantissa() -> None:
    levels = [level for level in FINITE if level >= 0]
    for index, (low, high) in enumerate(pairwise(levels)):
        even = (low, high)[index % 2]
        for dtype in (torch.float32, torch.float64):
            (code,) = encode_e4m3(torch.tensor([(low + high) / 2], dtype=dtype)).tolist()
            assert E4M3_LEVELS[code] == even


def test_float64_is_rounded_once() -> None:
    # float32 would round this to the tie between 16 and 18, which goes to 16.
    value = torch.tensor([17 + 2.0**-40], dtype=torch.float64)
    assert decode_e4m3(encode_e4m3(value)).item() == 18
    assert decode_e4m3(encode_e4m3(value.float())).item() == 16


def test_nan_stays() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert decode_e4m3(encode_e4m3(torch.tensor([math.nan], dtype=dtype))).isnan().all()


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 70), st.sampled_from([0.0, 8.0]))
def test_the_largest_of_a_row_is_the_largest_number(
    seed: int, rows: int, depth: int, spread: float
) -> None:
    x = random(seed, rows, depth, spread=spread)
    codes, scale = quantize_e4m3(x)
    values = decode_e4m3(codes)
    assert values.abs().amax(-1).tolist() == [LARGEST_E4M3] * rows
    # A mantissa of 3 bits, or half of the least step below the least normal number.
    bound = (x.abs() / 16).maximum(scale[:, None] * 2.0**-10) * 1.00001
    assert bool(((values * scale[:, None] - x).abs() <= bound).all())
    assert torch.equal(quantize_e4m3(-x)[0], codes ^ 0x80)
    # Multiplied by a power of two, a row keeps its codes.
    assert torch.equal(quantize_e4m3(x * 4)[0], codes)
    wide_codes, wide_scale = quantize_e4m3(x.double())
    assert wide_scale.dtype == torch.float64
    torch.testing.assert_close(wide_scale.float(), scale)
    assert float((wide_codes == codes).float().mean()) > 0.9


def test_rows_without_a_magnitude_are_zeros() -> None:
    codes, scale = quantize_e4m3(torch.tensor([[0.0, 0.0], [1e-31, -1e-38], [2e-30, 1e-30]]))
    assert decode_e4m3(codes).tolist() == [[0, 0], [0, 0], [448, 224]]
    assert scale[:2].tolist() == [0, 0] and scale[2] > 0
    assert quantize_e4m3(torch.tensor([[1.0, math.nan]]))[1].isnan().all()


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.integers(1, 9))
def test_groups_and_tiles_are_rows_of_their_own(
    seed: int, rows: int, depth: int, size: int
) -> None:
    x = random(seed, 2, rows, depth, spread=3.0)
    codes, scales = quantize_e4m3_groups(x, size)
    assert codes.shape == x.shape and scales.shape == (2, rows, -(-depth // size))
    for place, part in enumerate(x.split(size, -1)):
        own_codes, own_scales = quantize_e4m3(part)
        assert torch.equal(codes[..., place * size :][..., : part.shape[-1]], own_codes)
        assert torch.equal(scales[..., place], own_scales)
    codes, scales = quantize_e4m3_tiles(x, size)
    assert codes.shape == x.shape
    assert scales.shape == (2, -(-rows // size), -(-depth // size))
    for i, down in enumerate(x.split(size, -2)):
        for j, tile in enumerate(down.split(size, -1)):
            own_codes, own_scales = quantize_e4m3(tile.flatten(-2))
            found = codes[:, i * size :, j * size :][:, : tile.shape[1], : tile.shape[2]]
            assert torch.equal(found.flatten(-2), own_codes)
            assert torch.equal(scales[:, i, j], own_scales)


def test_a_matrix_has_one_scale() -> None:
    w = random(1, 2, 5, 7, spread=2.0)
    codes, scales = quantize_e4m3_matrix(w)
    for place, matrix in enumerate(w):
        own_codes, own_scale = quantize_e4m3(matrix.flatten())
        assert torch.equal(codes[place].flatten(), own_codes)
        assert scales[place].tolist() == [own_scale.item()] * 5


def test_large_matrices_are_rounded_in_parts() -> None:
    w = torch.randn(3, 401, 1111, generator=torch.Generator().manual_seed(2)).bfloat16()
    for found, wanted in zip(quantize_e4m3_rows(w), quantize_e4m3(w), strict=True):
        assert torch.equal(found, wanted)
