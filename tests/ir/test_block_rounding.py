"""The range of float16 scales: what is outside of it is refused, and nothing inside it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.block_rounding import BlockRounding
from infc.ir.e4m3 import E4M3_LEVELS
from infc.ir.errors import ProgramError, UsageError
from infc.ir.formats import Format
from infc.ir.program import WeightExpr
from infc.ir.quantized_pairs import QuantizedPairs
from infc.ir.schemes import SCHEMES
from infc.ir.types import DType, TensorType
from infc.ir.weights import checkpoint, evaluate_expr

GROUPED = [name for name, scheme in SCHEMES.items() if not scheme.is_exact]
HALVES = [name for name in GROUPED if SCHEMES[name].weight.scale is DType.F16]


def matrix(seed: int, magnitude: float) -> torch.Tensor:
    rows = torch.randn(3, 70, generator=torch.Generator().manual_seed(seed))
    return rows * (magnitude / float(rows.abs().max()))


@pytest.mark.parametrize("scheme", HALVES)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-12, 12))
def test_a_matrix_is_near_what_its_codes_stand_for_or_refused(
    scheme: str, seed: int, exponent: float
) -> None:
    weight = matrix(seed, 10.0**exponent)
    try:
        decoded = SCHEMES[scheme].weight.decode(*SCHEMES[scheme].quantize(weight), 70)
    except UsageError:
        if -4 < exponent < 4.5:
            raise
        return
    assert decoded.isfinite().all() and decoded.any()
    if exponent > -4:  # below, scales are subnormal
        assert (decoded - weight).abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize(
    ("scheme", "value", "limit"),
    [("q8_0", 1e7, "8.32e+06"), ("q4_0", 1e6, "5.24e+05"), ("q4_1", 1e6, "9.83e+05")],
)
@pytest.mark.parametrize("pairs", [None, QuantizedPairs()], ids=["alone", "pairs"])
def test_values_beyond_float16_scales_are_refused_with_the_limit(
    scheme: str, value: float, limit: str, pairs: QuantizedPairs | None
) -> None:
    weight = torch.ones(2, 64)
    weight[1, 5] = value
    expr = WeightExpr("codes", (checkpoint("w"),), {"scheme": scheme})
    with pytest.raises(UsageError) as caught:
        evaluate_expr(expr, {"checkpoint": lambda _: weight}, pairs)
    for part in (f"{value:.3g}", scheme, limit, "quantization.rules"):
        assert part in str(caught.value)
    SCHEMES["int8"].quantize(weight)


def test_a_minimum_beyond_float16_is_refused() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 3] = -65504
    SCHEMES["q4_1"].quantize(weight)
    weight[0, 3] = -7e4
    with pytest.raises(UsageError, match=r"7e\+04, too large for q4_1, .* -65504 or more"):
        SCHEMES["q4_1"].quantize(weight)


@pytest.mark.parametrize("scheme", HALVES)
def test_only_a_matrix_that_would_vanish_is_refused(scheme: str) -> None:
    weight = torch.full((2, 64), 1e-9)
    with pytest.raises(UsageError, match="1e-09, so small that all of it would become 0"):
        SCHEMES[scheme].quantize(weight)
    weight[0, 0] = 1
    SCHEMES[scheme].quantize(weight)
    SCHEMES[scheme].quantize(torch.zeros(2, 64))


@pytest.mark.parametrize("scheme", HALVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_row_scales(scheme: str, value: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 5] = value
    _, scales = SCHEMES[scheme].quantize(weight)
    assert scales.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("scheme", GROUPED)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (2, 0, 64)])
def test_a_matrix_without_elements_has_empty_codes(scheme: str, shape: tuple[int, ...]) -> None:
    weight, form = torch.empty(shape), SCHEMES[scheme].weight
    codes, scales = SCHEMES[scheme].quantize(weight)
    kind = TensorType(DType.F32, shape)
    assert tuple(codes.shape) == form.code_type(kind).shape and codes.dtype == torch.uint8
    assert tuple(scales.shape) == form.scale_type(kind).shape and scales.dtype == torch.float32


LEVELS = st.sets(st.integers(-127, 127), min_size=16, max_size=16).map(lambda x: tuple(sorted(x)))


@given(LEVELS, st.integers(0, 2**31))
def test_codes_of_any_levels_are_the_nearest(levels: tuple[int, ...], seed: int) -> None:
    """A format with another book needs no other code."""
    form = Format("book", 4, levels, scale=DType.I8)
    rounding = BlockRounding(form)
    weight = matrix(seed, 5000.0)[:, :64].reshape(-1, 32)
    scales = rounding.fit(weight)
    found = rounding.values(rounding.codes(weight, scales), scales)
    values = torch.tensor(levels, dtype=torch.float32) * scales.scale[..., None]
    best = (values - weight[..., None]).abs().min(-1).values
    # Rounded to a whole number first, and then to a level: by so much further at most.
    assert ((found - weight).abs() <= best + scales.scale.abs() * 1.001).all()


@pytest.mark.parametrize(
    ("bits", "levels", "scale"),
    [
        (3, (), DType.I8),
        (8, E4M3_LEVELS, DType.I8),
        (4, (), DType.I8),
        (4, tuple(range(16)), None),
        (4, (0.5, *range(1, 16)), DType.I8),
        (4, tuple(range(15, -1, -1)), DType.F16),
        (4, tuple(range(120, 136)), DType.I8),
    ],
)
def test_formats_that_nothing_can_pack_are_refused(
    bits: int, levels: tuple[float, ...], scale: DType | None
) -> None:
    with pytest.raises(ProgramError, match=f"x of {bits} bits cannot be stored"):
        Format("x", bits, levels, scale=scale)
