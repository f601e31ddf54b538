"""Matrices moved towards what the source model has: by the closed form, and never further away."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.torch_threads import one_torch_thread
from infc.passes.methods import correction
from infc.passes.methods.correction import RIDGE, Correction, Drift, correct, reduces_error
from infc.passes.methods.hessians import TILE, add_cross_moments, hessian


def drifted(depth: int, lengths: tuple[int, ...], seed: int) -> Drift:
    """Correlated inputs of some windows, and the same with an error that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(depth, depth, generator=generator) / depth**0.5
    wrong = torch.randn(depth, depth, generator=generator) / depth**0.5
    source = [torch.randn(n, depth, generator=generator) @ mixing for n in lengths]
    noise = [torch.randn(n, depth, generator=generator) for n in lengths]
    quantized = [x + 0.2 * x @ wrong + 0.1 * e for x, e in zip(source, noise, strict=True)]
    return Drift(source, quantized)


def matrices(rows: tuple[int, ...], depth: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(n, depth, generator=generator) for n in rows]


def corrected(
    weights: list[torch.Tensor], drift: Drift, strength: float, threads: int = 1
) -> list[torch.Tensor]:
    with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        moments = hessian(drift.quantized, pool)
        found = correct(weights, drift, moments, strength, pool)
    assert isinstance(found, Correction)
    return [found.of(place, weight) for place, weight in enumerate(weights)]


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    depth=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    strength=st.floats(0.05, 1),
    seed=st.integers(0, 1 << 20),
)
def test_it_is_ridge_regression_and_never_further_away(
    rows: list[int], depth: int, lengths: list[int], strength: float, seed: int
) -> None:
    """Whether there are fewer rows than columns or more, and with fewer tokens than columns."""
    drift, weights = drifted(depth, tuple(lengths), seed), matrices(tuple(rows), depth, seed)
    x, y = (torch.cat(list(part)).double() for part in (drift.source, drift.quantized))
    moments = y.T @ y / len(y)
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(depth)
    shift = (x - y).T @ y / len(y) @ torch.linalg.inv(moments + ridge)
    for weight, found in zip(weights, corrected(weights, drift, strength), strict=True):
        wide = weight.double()
        expected = wide + strength * wide @ shift
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
        before = (x @ wide.T - y @ wide.T).norm()
        assert (x @ wide.T - y @ found.double().T).norm() <= before * (1 + 1e-5)


@pytest.mark.parametrize("rows", [(40, 30), (700, 100)])
def test_threads_do_not_show(rows: tuple[int, ...]) -> None:
    depth = TILE + 50
    drift, weights = drifted(depth, (60, 33, 41), 3), matrices(rows, depth, 3)
    one, three = (corrected(weights, drift, 0.5, threads) for threads in (1, 3))
    assert all(map(torch.equal, one, three))


def test_moments_of_two_are_summed_over_windows() -> None:
    drift = drifted(TILE + 9, (20, 31), 5)
    with one_torch_thread(), ThreadPoolExecutor(2) as pool:
        found = torch.zeros(TILE + 9, TILE + 9)
        lefts = [x.T for x in drift.source]
        for here in (slice(0, 1), slice(1, 2)):
            tokens = drift.num_tokens
            add_cross_moments(found, lefts[here], drift.quantized[here], tokens, pool)
    x, y = (torch.cat(list(part)).double() for part in (drift.source, drift.quantized))
    torch.testing.assert_close(found.double(), x.T @ y / len(y), rtol=1e-4, atol=1e-5)


def test_what_has_not_drifted_is_seen() -> None:
    drift = drifted(8, (5, 6), 7)
    assert Drift(drift.source, [x.clone() for x in drift.source]).is_zero
    assert not drift.is_zero


def test_inputs_that_are_not_finite_have_no_correction() -> None:
    drift = drifted(8, (9,), 7)
    drift.quantized[0][3, 2] = torch.nan
    with ThreadPoolExecutor(1) as pool:
        moments = hessian(drift.quantized, pool)
        assert correct(matrices((4,), 8, 1), drift, moments, 0.5, pool) is None


def test_a_correction_is_tested_on_windows_that_it_was_not_found_on() -> None:
    """One that is found in noise makes up for nothing elsewhere; one of a real drift does."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    matrix, gain = random(24, 64), torch.eye(64) + 0.1 * random(64, 64) / 8
    source = [random(48, 64) for _ in range(8)]
    noisy = Drift(source, [one + 0.3 * random(48, 64) for one in source])
    drifted = Drift(source, [one @ gain for one in source])
    with ThreadPoolExecutor(1) as pool:
        for drift, few, helps in ((noisy, 1, False), (drifted, 6, True)):
            fitted, held = drift.parts(4)
            assert len(fitted.source) == 6 and len(held.source) == 2
            assert held.quantized[0] is drift.quantized[3]
            fitted = Drift(fitted.source[:few], fitted.quantized[:few])
            found = correct([matrix], fitted, hessian(fitted.quantized, pool), 1.0, pool)
            assert found is not None
            assert reduces_error([matrix], found, held, pool) == helps
            assert reduces_error([matrix], found, fitted, pool)


def test_how_many_windows_are_taken_at_a_time_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drift, weights = drifted(40, (30, 20, 10, 25, 7), 3), matrices((60, 5), 40, 3)
    made = []
    for count in (1, 2, 100):
        monkeypatch.setattr(correction, "_WINDOWS", count)
        made.append(corrected(weights, drift, 0.5, 2))
    for one in made[1:]:
        assert all(map(torch.equal, made[0], one))
