"""Compiled quantisers: the codes and scales that the schemes say, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from infc.codegen.cpp.quantizers import Quantizers, compiled_quantizers
from infc.ir.program import WeightExpr
from infc.ir.quantized_pairs import QuantizedPairs
from infc.ir.schemes import SCHEMES, Quantizer
from infc.ir.weights import checkpoint, evaluate_expr
from infc.passes.methods.feedback import CompiledFeedback, factorize, feed_back
from infc.passes.methods.grids import GRIDS

FED = ("int8", "int6", "int4", "int4-g64", "int4-g128")
COMPILED = (*FED, "int8-token", "int4-token")


@pytest.fixture(scope="module")
def library() -> Iterator[Quantizers]:
    with compiled_quantizers(pytest.fail) as compiled:
        yield compiled


@pytest.fixture(scope="module")
def quantizers(library: Quantizers) -> Mapping[str, Quantizer]:
    return library.table()


def rounding(quantizers: Quantizers, scheme: str) -> CompiledFeedback:
    nearest, fed = quantizers.table()[scheme], quantizers.feedback()[scheme]
    return CompiledFeedback(SCHEMES[scheme], nearest, fed)


def matrix(seed: int, shape: tuple[int, ...], spread: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size; of the first ones one is zeros, one too small for a scale."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator)
    rows *= torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))
    if len(rows) > 2:
        rows[1] = 0
        rows[2] *= 1e-33
    return rows.to(dtype)


def same(quantizer: Quantizer, scheme: str, weight: torch.Tensor) -> bool:
    """Whether it makes the tensors of the scheme; an AssertionError shows those that differ."""
    for expected, made in zip(SCHEMES[scheme].quantize(weight), quantizer(weight), strict=True):
        assert made.dtype == expected.dtype and made.shape == expected.shape
        assert torch.equal(made.nan_to_num(7), expected.nan_to_num(7))
    return True


@pytest.mark.parametrize("scheme", COMPILED)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    depth=st.integers(1, 200),
    spread=st.sampled_from([0.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(seed=450, shape=[5], depth=70, spread=0.0, dtype=torch.float32)  # as large, both signs
def test_they_make_the_codes_of_the_schemes(
    quantizers: Mapping[str, Quantizer],
    scheme: str,
    seed: int,
    shape: list[int],
    depth: int,
    spread: float,
    dtype: torch.dtype,
) -> None:
    assert same(quantizers[scheme], scheme, matrix(seed, (*shape, depth), spread, dtype))


@pytest.mark.parametrize("scheme", COMPILED)
def test_many_rows_in_parts_and_from_another_layout(
    quantizers: Mapping[str, Quantizer], scheme: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert same(quantizers[scheme], scheme, matrix(1, (3000, 700), 1.0, dtype))
        assert same(quantizers[scheme], scheme, matrix(2, (96, 40), 1.0, dtype).T)


@pytest.mark.parametrize("scheme", COMPILED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_as_it_did(
    quantizers: Mapping[str, Quantizer], scheme: str, value: float
) -> None:
    for place in (0, 39, 69):
        weight = matrix(3, (4, 70), 0.0, torch.bfloat16)
        weight[3, place] = value
        assert same(quantizers[scheme], scheme, weight)


@pytest.mark.parametrize("scheme", COMPILED)
def test_other_element_types_and_empty_matrices(
    quantizers: Mapping[str, Quantizer], scheme: str
) -> None:
    assert same(quantizers[scheme], scheme, matrix(4, (4, 70), 0.0, torch.float16))
    assert same(quantizers[scheme], scheme, torch.zeros(0, 70))


@pytest.mark.parametrize("scheme", COMPILED)
def test_the_schemes_themselves_serve_where_no_library_can_be_loaded(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a temporary directory from which nothing may be executed."""

    def refused(path: str) -> None:
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr("infc.codegen.cpp.quantizers.ctypes.CDLL", refused)
    lines: list[str] = []
    with compiled_quantizers(lines.append) as compiled:
        for seed in range(2):
            same(compiled.table()[scheme], scheme, matrix(seed, (4, 70), 0.0, torch.float32))
    (line,) = lines  # said once
    assert line.endswith("which takes longer: failed to map segment from shared object")


def correlated(depth: int, seed: int) -> torch.Tensor:
    """Second moments of inputs with a common part."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, depth, generator=generator)
    inputs += torch.randn(300, 1, generator=generator)
    return inputs.T @ inputs / 300


@pytest.mark.parametrize("scheme", FED)
@given(
    rows=st.integers(1, 70),
    depth=st.integers(1, 200),
    spread=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 2**20),
)
def test_feedback_is_that_of_torch(
    library: Quantizers, scheme: str, rows: int, depth: int, spread: float, seed: int
) -> None:
    """Up to sums whose last bits decide a tie, after which a row goes another way."""
    weight = matrix(seed, (rows, depth), spread, torch.float32)
    factor = factorize(correlated(depth, seed), 0.01)
    expected = feed_back(weight, factor, GRIDS[scheme])
    found = rounding(library, scheme).feed_back(weight, factor)
    assert found is not None
    stored = SCHEMES[scheme].weight.decode(found.parts["codes"], found.parts["scales"], depth)
    assert torch.equal(stored, found.values)
    assert torch.equal(found.parts["scales"], expected.parts["scales"])
    other = (found.values != expected.values).any(1)
    assert other.sum() <= 1 + 0.1 * rows
    for name in ("error", "nearest", "size"):
        made, wanted = getattr(found, name), getattr(expected, name)
        assert made == pytest.approx(wanted, rel=0.05, abs=1e-5 * expected.size)


@pytest.mark.parametrize("scheme", FED)
def test_feedback_gives_a_row_the_same_codes_whatever_is_beside_it(
    library: Quantizers, scheme: str
) -> None:
    weight, factor = matrix(7, (50, 90), 1.0, torch.float32), factorize(correlated(90, 7), 0.01)
    scales = GRIDS[scheme].start(weight)[0]
    feed = library.feedback()[scheme]
    whole = feed(weight, scales, factor.upper, factor.d)
    assert whole is not None
    for part in (slice(0, 1), slice(3, 40), slice(49, 50)):
        alone = feed(weight[part], scales[part], factor.upper, factor.d)
        assert alone is not None
        assert all(map(torch.equal, alone, (one[part] for one in whole)))


@pytest.mark.parametrize("scheme", FED)
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e18])
def test_feedback_says_the_error_that_it_leaves(
    library: Quantizers, scheme: str, size: float
) -> None:
    """Of weights whose squares are no numbers of float32 as well."""
    weight, factor = matrix(3, (40, 100), 1.0, torch.float32), factorize(correlated(100, 3), 0.01)
    form = SCHEMES[scheme].weight
    scales = GRIDS[scheme].start(weight * size)[0]
    made = library.feedback()[scheme](weight * size, scales, factor.upper, factor.d)
    assert made is not None
    wrong = (weight * size).double() - form.decode(made[0], scales, 100).double()
    whole = factor.upper.double() * factor.d.double().sqrt()
    # A row of next to nothing has the scale 0.
    torch.testing.assert_close(made[1], (wrong @ whole).square().sum(1), rtol=1e-3, atol=1e-60)


def test_feedback_without_a_library_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> None:
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr("infc.codegen.cpp.quantizers.ctypes.CDLL", refused)
    with compiled_quantizers(lambda _: None) as compiled:
        weight, factor = matrix(7, (5, 40), 0.0, torch.float32), factorize(correlated(40, 7), 0.01)
        assert rounding(compiled, "int4").feed_back(weight, factor) is None


def test_pairs_are_made_by_them() -> None:
    asked = []

    def mine(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(weight)
        return SCHEMES["int4"].quantize(weight)

    pairs = QuantizedPairs(quantizers={"int4": mine})
    weight = matrix(5, (4, 70), 0.0, torch.bfloat16)
    loaders = {"checkpoint": lambda _: weight}
    for part in ("codes", "scales"):
        expr = WeightExpr(part, (checkpoint("w"),), {"scheme": "int4"})
        evaluate_expr(expr, loaders, pairs)
    assert len(asked) == 1
