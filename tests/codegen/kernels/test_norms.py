"""Norms: values against float64, residual sums rounded once, rows that don't feel neighbours."""

import numpy as np
import pytest

from .harness import Array, Kernels, same_bits

DIMS = (1, 15, 16, 33, 64, 131)
EPS = 1e-5


def rms(x: Array, w: Array) -> Array:
    result: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w
    return result


def layer(x: Array, w: Array, b: Array | None) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    y: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * w
    return y if b is None else y + b


def close(k: Kernels, got: Array, expected: Array, roundings: int = 2) -> bool:
    bound = (roundings * k.eps + 40 * 2.0**-24) * (np.abs(expected) + 1)
    return bool((np.abs(k.values(got) - expected) <= bound).all())


@pytest.mark.parametrize("round_first", [0, 1])
def test_rms_norm_matches_float64(k: Kernels, round_first: int) -> None:
    rng = np.random.default_rng(0)
    for dim in DIMS:
        x, w = k.array(rng.standard_normal((5, dim))), k.array(rng.standard_normal(dim))
        y = k.poison(5, dim)
        with k.team(2) as team:
            k.call("rms_norm_rows", team, round_first, x, dim, w, y, dim, 5, 1, dim, EPS)
        assert close(k, y, rms(k.values(x), k.values(w)))


def test_rounding_before_the_weight_is_what_llama_does(k: Kernels) -> None:
    rng = np.random.default_rng(1)
    x, w = k.array(rng.standard_normal((64, 96))), k.array(rng.standard_normal(96))
    y = k.poison(64, 96)
    with k.team(1) as team:
        k.call("rms_norm_rows", team, 1, x, 96, w, y, 96, 64, 1, 96, EPS)
    normed = k.array(rms(k.values(x), np.ones(96)))
    expected = k.array(k.values(normed) * k.values(w))
    # All but the elements whose first rounding the last bits of the sum decide.
    assert (expected == y).mean() > (0.98 if k.dtype == "bf16" else 0.3)


def test_heads_inside_a_wider_row_are_normed_in_place(k: Kernels) -> None:
    rng = np.random.default_rng(2)
    x = k.array(rng.standard_normal((3, 4 * 24 + 10)))
    w = k.array(rng.standard_normal(24))
    y = x.copy()
    with k.team(3) as team:
        k.call("rms_norm_rows", team, 0, y, 106, w, y, 106, 3, 4, 24, EPS)
    heads = k.values(x)[:, :96].reshape(3, 4, 24)
    assert close(k, y[:, :96].reshape(3, 4, 24), rms(heads, k.values(w)))
    assert same_bits(np.ascontiguousarray(y[:, 96:]), np.ascontiguousarray(x[:, 96:]))


def test_add_rms_norm_norms_the_rounded_sum(k: Kernels) -> None:
    rng = np.random.default_rng(3)
    for dim in DIMS:
        x, r = (k.array(rng.standard_normal((4, dim))) for _ in range(2))
        w = rng.standard_normal(dim).astype(np.float32)
        y, total = k.poison(4, dim), k.poison(4, dim)
        with k.team(2) as team:
            k.call("add_rms_norm_rows", team, x, r, w, y, total, 4, dim, EPS)
        assert same_bits(total, k.array(k.values(x) + k.values(r)))
        assert close(k, y, rms(k.values(total), w.astype(np.float64)))


def test_layer_norm_matches_float64(k: Kernels) -> None:
    rng = np.random.default_rng(4)
    for dim in DIMS:
        x, w, b = (k.array(rng.standard_normal(s) + 3) for s in ((5, dim), dim, dim))
        r = k.array(rng.standard_normal((5, dim)))
        for bias in (None, b):
            wide = None if bias is None else k.values(bias)
            y, z, total = (k.poison(5, dim) for _ in range(3))
            with k.team(2) as team:
                k.call("layer_norm_rows", team, x, dim, w, bias, y, 5, dim, EPS)
                k.call("add_layer_norm_rows", team, x, r, w, bias, z, total, 5, dim, EPS)
            assert close(k, y, layer(k.values(x), k.values(w), wide), 20)
            assert same_bits(total, k.array(k.values(x) + k.values(r)))
            assert close(k, z, layer(k.values(total), k.values(w), wide), 20)


def test_a_row_does_not_depend_on_the_others(k: Kernels) -> None:
    rng = np.random.default_rng(5)
    x, r = (k.array(rng.standard_normal((7, 83))) for _ in range(2))
    w = rng.standard_normal(83).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        y, total = k.poison(7, 83), k.poison(7, 83)
        with k.team(threads) as team:
            k.call("add_rms_norm_rows", team, x, r, w, y, total, 7, 83, EPS)
        results.append(y)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    y, total = k.poison(1, 83), k.poison(1, 83)
    with k.team(2) as team:
        k.call("add_rms_norm_rows", team, x[4:5].copy(), r[4:5].copy(), w, y, total, 1, 83, EPS)
    assert same_bits(y[0], results[0][4])


@pytest.mark.parametrize("dim", [1, 33, 131])
def test_a_narrow_result_is_the_wide_one_rounded_once(k: Kernels, dim: int) -> None:
    """Norms and gates of float rows: a product that reads them would round the same numbers."""
    rng = np.random.default_rng(7)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, dim), (dim,)))
    y, total = k.poison(27, dim), np.full((6, dim), np.nan, np.float32)
    wide = np.full((27, dim), np.nan, np.float32)
    with k.team(2) as team:
        k.call("rounded_results", team, x, w, y, wide, total, 6, dim, EPS)
    assert np.isfinite(wide).all()
    assert same_bits(y, k.array(wide))
