"""Error feedback: as the paper has it, and never worse than nearest, whatever the inputs."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.errors import PassError
from infc.ir.schemes import get_scheme
from infc.ir.torch_threads import one_torch_thread
from infc.passes.methods.feedback import Rounded, factorize, feed_back
from infc.passes.methods.gptq import decoded
from infc.passes.methods.grids import GRIDS, Grid, Int4Grid
from infc.passes.methods.hessians import TILE, hessian

SCHEMES = sorted(GRIDS)
DAMPING = 0.01


def correlated(tokens: int, depth: int, seed: int) -> torch.Tensor:
    """Inputs `[tokens, depth]` with a common part, and columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(depth, depth, generator=generator) / depth**0.5
    own = torch.randn(tokens, depth, generator=generator) @ mixing
    common = torch.randn(tokens, 1, generator=generator)
    sizes = torch.rand(depth, generator=generator).add(0.1)
    found: torch.Tensor = (own + common) * sizes
    return found


def matrix(rows: int, depth: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed + 1))


def round_to_nearest(rows: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What rows `[N, K]` are in a grid without feedback, in float32."""
    state = grid.start(rows)
    parts = rows.T.contiguous().split(grid.group or rows.shape[1])
    values = [grid.round(one, state, grid.fit(one, state, None))[1] for one in parts]
    return torch.cat(values).T


def moments(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def textbook(
    weight: torch.Tensor, moment: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ as Frantar et al. write it: the inverse Hessian, column by column, in float64.

    Also which rows met a value that was a tie, or nearly: the last bits decide these.
    """
    wide = moment.double()
    dead = wide.diagonal() == 0
    mean = wide.diagonal().sum() / (~dead).sum()
    wide = wide + torch.diag(DAMPING * mean + dead * mean)
    upper = torch.linalg.cholesky(torch.linalg.inv(wide), upper=True)
    left = weight.double().clone()
    rounded = torch.zeros_like(left)
    state = grid.start(weight)
    group: tuple[torch.Tensor, ...] = ()
    close = torch.zeros(len(weight), dtype=torch.bool)
    for column in range(weight.shape[1]):
        if column % (grid.group or weight.shape[1]) == 0:
            end = column + (grid.group or weight.shape[1])
            given = left[:, column:end].T
            importance = upper.diagonal()[column:end].pow(-2).float()
            group, *others = (
                grid.fit((given * by).float(), state, importance) for by in (1.0, 0.9999, 1.0001)
            )
            for other in others:
                for one, two in zip(group, other, strict=True):
                    close |= one != two
        value = left[:, column]
        # Steps of e4m3 around zero are as small as what float32 loses of the largest value.
        noise = 3e-6 * weight.double().abs().amax(1)
        here, *near = (
            grid.round(one.float(), state, group)[1].double()
            for one in (value, value * 0.9999, value * 1.0001, value - noise, value + noise)
        )
        for one in near:
            close |= one != here
        rounded[:, column] = here
        error = (left[:, column] - here) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
    return rounded, close


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 20),
    depth=st.integers(1, 300),
    tokens=st.integers(2, 400),
    dead=st.sets(st.integers(0, 299), max_size=3),
    seed=st.integers(0, 1 << 20),
)
def test_it_is_gptq(
    scheme: str, rows: int, depth: int, tokens: int, dead: set[int], seed: int
) -> None:
    inputs, weight, grid = correlated(tokens, depth, seed), matrix(rows, depth, seed), GRIDS[scheme]
    inputs[:, [place for place in dead if place < depth]] = 0
    factor = factorize(moments(inputs), DAMPING)
    found = feed_back(weight, factor, grid)
    if found.error == found.nearest:
        return  # rounding to nearest was taken
    expected, close = textbook(weight, moments(inputs), grid)
    assert factor.dead == len({place for place in dead if place < depth})
    torch.testing.assert_close(found.values[~close].double(), expected[~close], rtol=1e-5, atol=0)


class Unweighted(Int4Grid):
    """The multiplier of a group by what its columns are, whatever their inputs."""

    def fit(
        self,
        values: torch.Tensor,
        row: tuple[torch.Tensor, ...],
        importance: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        return super().fit(values, row, None)


def output_error(inputs: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> float:
    wrong = inputs.double() @ (weight - values).double().T
    return float(wrong.square().sum() / len(inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=25)
@given(depth=st.integers(1, 200), tokens=st.integers(1, 300), seed=st.integers(0, 1 << 20))
def test_never_worse_than_nearest(scheme: str, depth: int, tokens: int, seed: int) -> None:
    """Also with fewer tokens than columns; and the parts say what was computed with."""
    inputs, weight, grid = correlated(tokens, depth, seed), matrix(8, depth, seed), GRIDS[scheme]
    found = feed_back(weight, factorize(moments(inputs), DAMPING), grid)
    assert torch.equal(decoded(scheme, found.parts, depth), found.values)
    nearest = round_to_nearest(weight, grid)
    bound = output_error(inputs, weight, nearest)
    size = output_error(inputs, weight, torch.zeros(()))
    rounding = 1e-5 * size
    assert output_error(inputs, weight, found.values) <= bound + rounding
    assert found.error == pytest.approx(output_error(inputs, weight, found.values), abs=rounding)
    assert found.nearest == pytest.approx(bound, abs=rounding)
    assert found.size == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize(("scheme", "gain"), [("int8", 0.5), ("int4", 0.5)])
def test_correlated_inputs_gain(scheme: str, gain: float) -> None:
    inputs, weight = correlated(1000, 256, 3), matrix(64, 256, 3)
    found = feed_back(weight, factorize(moments(inputs), DAMPING), GRIDS[scheme])
    assert 0 < found.error < gain * found.nearest


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("depth", [1, 31, 32, 33, 128, 200])
def test_without_feedback_it_is_the_schemes_own_rounding(scheme: str, depth: int) -> None:
    weight = matrix(7, depth, depth)
    weight[3] = 0
    codes, scales = get_scheme(scheme).quantize(weight)
    expected = decoded(scheme, {"codes": codes, "scales": scales}, depth)
    assert torch.equal(round_to_nearest(weight, GRIDS[scheme]), expected)


def test_groups_are_fitted_to_the_columns_that_count() -> None:
    """A column that hardly any input reaches does not decide how the others are rounded."""
    inputs, weight = correlated(500, 32, 11), matrix(20, 32, 11)
    inputs[:, 7] /= 1000
    weight[:, 7] = 12
    factor = factorize(moments(inputs), DAMPING)
    found = feed_back(weight, factor, GRIDS["int4"])
    unweighted = feed_back(weight, factor, Unweighted())
    assert found.error < 0.95 * unweighted.error


def test_columns_that_no_input_reached_are_rounded_to_nearest() -> None:
    inputs, weight = correlated(300, 64, 5), matrix(16, 64, 5)
    inputs[:, [0, 31, 40]] = 0
    found = feed_back(weight, factorize(moments(inputs), DAMPING), GRIDS["int8-token"])
    nearest = round_to_nearest(weight, GRIDS["int8-token"])
    assert torch.equal(found.values[:, [0, 31, 40]], nearest[:, [0, 31, 40]])
    assert not torch.equal(found.values, nearest)
    none = factorize(torch.zeros(64, 64), DAMPING)
    assert none.dead == 64
    assert torch.equal(feed_back(weight, none, GRIDS["int8-token"]).values, nearest)


def test_damping_is_raised_where_there_is_no_factor() -> None:
    # Eigenvalues 4 and -2: no rounding makes such, but a little of it can tip one below zero.
    bad = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    factor = factorize(bad.clone(), DAMPING)
    assert factor.damping == pytest.approx(10)
    restored = factor.upper @ torch.diag(factor.d) @ factor.upper.T
    torch.testing.assert_close(restored, bad + 10 * torch.eye(2))
    with pytest.raises(PassError, match="no Cholesky factor"):
        factorize(bad * torch.tensor([[1.0, 1e6], [1e6, 1.0]]), DAMPING)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite(value: float) -> None:
    inputs = correlated(10, 8, 7)
    inputs[4, 2] = value
    with ThreadPoolExecutor(1) as pool, pytest.raises(PassError, match="NaN or infinity"):
        factorize(hessian([inputs], pool), DAMPING)


def test_moments_do_not_depend_on_threads() -> None:
    depth = TILE + 70
    windows = [correlated(tokens, depth, tokens) for tokens in (90, 33, 64)]

    def with_threads(count: int) -> torch.Tensor:
        with one_torch_thread(), ThreadPoolExecutor(count) as pool:
            return hessian(windows, pool)

    found = with_threads(1)
    assert torch.equal(found, with_threads(3))
    joined = torch.cat(windows).double()
    expected = (joined.T @ joined / len(joined)).triu()
    torch.testing.assert_close(found.double().triu(), expected, rtol=1e-4, atol=1e-5)


def test_rows_are_rounded_each_by_itself() -> None:
    """Rows of a matrix are taken some at a time: how many must not show but in last bits."""
    inputs, weight = correlated(300, 96, 9), matrix(40, 96, 9)
    factor = factorize(moments(inputs), DAMPING)

    def values(rows: torch.Tensor) -> Rounded:
        return feed_back(rows, factor, GRIDS["int8"])

    whole, parts = values(weight), [values(part) for part in weight.split(13)]
    joined = torch.cat([part.values for part in parts])
    assert (joined != whole.values).float().mean() < 0.01
    assert sum(part.error for part in parts) == pytest.approx(whole.error, rel=0.02)


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if "q" not in one])
def test_errors_of_huge_weights_are_as_those_of_others(scheme: str) -> None:
    """Their squares are beyond float32. Scales in float16 have a smaller range anyway."""
    inputs, grid = correlated(100, 64, 3), GRIDS[scheme]
    factor = factorize(moments(inputs), DAMPING)
    plain = feed_back(matrix(4, 64, 3), factor, grid)
    found = feed_back(matrix(4, 64, 3) * 2.0**80, factor, grid)
    for mine, theirs in ((found.error, plain.error), (found.nearest, plain.nearest)):
        assert mine / found.size == pytest.approx(theirs / plain.size, rel=0.2)
    assert 0 < found.error <= found.nearest < found.size < math.inf
