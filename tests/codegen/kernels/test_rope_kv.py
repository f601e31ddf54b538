"""Rope and the KV cache: angles and rotations against float64, and what lies where afterwards."""

import numpy as np
import pytest

from .cache import Cache, Heads, random_sequence
from .harness import Array, Kernels, same_bits


def angles(positions: Array, rotary: int) -> tuple[Array, Array]:
    angle = positions[:, None] / 10000.0 ** (np.arange(0, rotary, 2) / rotary)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: Array, cos: Array, sin: Array, rotary: int, interleaved: int) -> Array:
    """x [T, heads, D] in float64; cos and sin are each token's rows."""
    y = x.copy()
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    half = rotary // 2
    first, second = (
        (np.arange(0, rotary, 2), np.arange(1, rotary, 2))
        if interleaved
        else (np.arange(half), np.arange(half, rotary))
    )
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y


@pytest.mark.parametrize("quarters", [0, 1])
def test_sines_are_the_nearest_floats_of_every_angle(k: Kernels, quarters: int) -> None:
    """The angle is rounded to float32 before, as checkpoints' own code does."""
    positions = np.array([0, 1, 2, 3, 44, 355, 8191, 103993, 2**20 - 1, 2**24], np.int32)
    frequencies = (1.0 / 10000.0 ** (np.arange(0, 256, 2) / 256)).astype(np.float32)
    y = np.full((len(positions), len(frequencies)), np.nan, np.float32)
    with k.team(2) as team:
        k.call("rotary_rows", team, positions, frequencies, 1.25, y, *y.shape, quarters)
    turned = (positions.astype(np.float32)[:, None] * frequencies).astype(np.longdouble)
    exact = np.cos(turned) if quarters else np.sin(turned)
    assert same_bits(y, exact.astype(np.float32) * np.float32(1.25))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (24, 10), (5, 2)])
def test_rope_matches_float64(k: Kernels, interleaved: int, dim: int, rotary: int) -> None:
    rng = np.random.default_rng(0)
    x = k.array(rng.standard_normal((7, 3 * dim + 4)))
    cos, sin = angles(rng.integers(0, 50, 7), rotary)
    y = x.copy()
    stride = x.shape[1]
    with k.team(2) as team:
        k.call(
            "rope_heads",
            team,
            *(y, stride, y, stride, cos, sin, rotary, interleaved, 3, dim, 7),
        )
    heads = k.values(x)[:, : 3 * dim].reshape(7, 3, dim)
    exact = rotate(heads, cos, sin, rotary, interleaved)
    got = k.values(y)[:, : 3 * dim].reshape(7, 3, dim)
    assert (np.abs(got - exact) <= 4 * k.eps * (np.abs(heads).max() + 1)).all()
    assert same_bits(np.ascontiguousarray(y[:, 3 * dim :]), np.ascontiguousarray(x[:, 3 * dim :]))


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope_kv_write_is_rope_and_then_kv_write(k: Kernels, interleaved: int) -> None:
    heads = Heads(4, 2, 24, 9)
    rng = np.random.default_rng(1)
    s = random_sequence(k, rng, 41, heads)
    q, key = k.poison(41, 4, 24), k.poison(41, 2, 24)
    fused_q = k.poison(41, 4, 24)
    cache = Cache(k, heads, [41], 16)
    slots = cache.slots(0, 0, 41)
    rope = (*angles(np.arange(41), 20), 20, interleaved)
    with k.team(3) as team:
        k.call("rope_heads", team, s.q, 96, q, 96, *rope, 4, 24, 41)
        k.call("rope_heads", team, s.k, 48, key, 48, *rope, 2, 24, 41)
        k.call(
            "rope_write_kv",
            team,
            *(s.q, 96, fused_q, 96, s.k, 48, s.v, 18, *rope, 4, cache.view(), slots, 41),
        )
    stored_k, stored_v = cache.stored(0, 41)
    assert same_bits(fused_q, q)
    assert same_bits(np.ascontiguousarray(stored_k), key)
    assert same_bits(np.ascontiguousarray(stored_v), s.v)


def test_kv_write_touches_its_slots_alone(k: Kernels) -> None:
    heads = Heads(2, 2, 5, 16)
    s = random_sequence(k, np.random.default_rng(2), 20, heads)
    cache = Cache(k, heads, [20, 20], 16)
    with k.team(2) as team:
        slots = cache.slots(1, 3, 18)
        k.call("write_kv", team, s.k, 10, s.v, 32, slots, 15, cache.view())
    stored_k, stored_v = cache.stored(1, 20)
    assert same_bits(np.ascontiguousarray(stored_k[3:18]), s.k[:15])
    assert same_bits(np.ascontiguousarray(stored_v[3:18]), s.v[:15])
    written = 15 * 2 * (5 + 16)
    assert np.count_nonzero(~np.isnan(k.values(cache.memory))) == written


def test_copy_blocks_copies_every_layer(k: Kernels) -> None:
    heads = Heads(2, 2, 16, 16)
    cache = Cache(k, heads, [16 * 6], 16)
    cache.memory[:] = k.array(np.random.default_rng(3).standard_normal(cache.memory.shape))
    before = cache.memory.copy()
    pairs = np.array([[1, 4], [2, 5]], np.int32)
    with k.team(3) as team:
        k.call("copy_kv", team, cache.view(), pairs, 2)
    before[[4, 5]] = before[[1, 2]]
    assert same_bits(cache.memory, before)
