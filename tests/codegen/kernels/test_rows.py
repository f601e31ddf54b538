"""Softmax, top-k, gated activations and experts against float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .harness import DTYPES, TARGETS, Array, Kernels, kernels, same_bits

ACTS = ("silu", "gelu", "gelu_tanh", "relu")


def act(name: str, x: Array) -> Array:
    t = torch.from_numpy(x)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
    }
    return np.asarray(functions[name](t).numpy())


def test_softmax_matches_float64(k: Kernels) -> None:
    rng = np.random.default_rng(0)
    for dim in (1, 7, 16, 50, 300):
        x = k.array(rng.standard_normal((5, dim)) * 9)
        if dim > 3:
            x[2, 1:] = k.array(np.full(dim - 1, -np.inf))
        y = k.poison(5, dim + 2)
        with k.team(2) as team:
            k.call("softmax", team, x, dim, y, dim + 2, 5, dim)
        exact = torch.softmax(torch.from_numpy(k.values(x)), -1).numpy()
        error = np.abs(k.values(y)[:, :dim] - exact)
        assert (error <= exact * (k.eps + 20 * 2.0**-24) + 1e-9).all()
        assert np.isnan(k.values(y)[:, dim:]).all()


def test_topk_takes_the_lower_index_of_equals_and_nan_first(k: Kernels) -> None:
    rows = np.array([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, np.nan, 7, np.nan, 1]], np.float32)
    expected = [[1, 2, 4, 3], [0, 1, 2, 3], [1, 3, 2, 0]]
    x = k.array(rows)
    values, index = k.poison(3, 4), np.full((3, 4), -7, np.int64)
    with k.team(2) as team:
        k.call("topk", team, x, 5, values, index, 3, 5, 4)
    assert index.tolist() == expected
    assert same_bits(values, np.take_along_axis(x, index, 1))


@settings(max_examples=30)
@given(st.integers(1, 70), st.data())
def test_topk_is_a_stable_sort(dim: int, data: st.DataObject) -> None:
    k = kernels("x86-64-v2", "float")
    count = data.draw(st.integers(1, dim))
    x = k.array(np.array(data.draw(st.lists(st.integers(0, 9), min_size=dim, max_size=dim)))[None])
    values, index = k.poison(1, count), np.zeros((1, count), np.int64)
    with k.team(1) as team:
        k.call("topk", team, x, dim, values, index, 1, dim, count)
    assert index[0].tolist() == np.argsort(-x[0], kind="stable")[:count].tolist()


@pytest.mark.parametrize("name", ACTS)
def test_gated_act_matches_float64(k: Kernels, name: str) -> None:
    rng = np.random.default_rng(1)
    for rows, inner in ((1, 5), (3, 16), (4, 77)):
        x = k.array(rng.standard_normal((rows, 2 * inner + 3)) * 3)
        gate, up = k.values(x)[:, :inner], k.values(x)[:, inner : 2 * inner]
        exact = act(name, gate) * up
        bits = []
        for threads in (1, 2, 3):
            y = k.poison(rows, inner)
            with k.team(threads) as team:
                k.call("gate", team, ACTS.index(name), x, x.shape[1], y, inner, rows, inner)
            bits.append(y)
        bound = np.abs(exact) * (k.eps + 2.0**-20) + np.abs(gate * up) * 2.0**-20
        assert (np.abs(k.values(bits[0]) - exact) <= bound).all()
        assert same_bits(bits[0], bits[1])
        assert same_bits(bits[0], bits[2])


def run_experts(k: Kernels, x: Array, index: Array, weight: Array, gu: Array, down: Array) -> Array:
    """Experts over rows of x; the weights are elements [E, 2I, H] and [E, H, I]."""
    tokens, slots = index.shape
    count, hidden, inner = down.shape
    shape = (tokens, count, hidden, inner, slots)
    scratch = np.full(k.call("moe_scratch", *shape), 0xFF, np.uint8)
    y = k.poison(tokens, hidden)
    with k.team(2) as team:
        k.call(
            "experts",
            team,
            x,
            hidden,
            index,
            weight,
            k.pack(gu),
            k.pack(down),
            y,
            hidden,
            *shape,
            scratch,
        )
    return y


@settings(max_examples=8)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from(DTYPES),
    st.integers(1, 25),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_experts_match_float64_and_rows_stand_alone(
    target: str, dtype: str, tokens: int, count: int, slots: int, seed: int
) -> None:
    k = kernels(target, dtype)
    hidden, inner, slots = 34, 21, min(slots, count)
    rng = np.random.default_rng(seed)
    x, weight = (k.array(rng.standard_normal((tokens, n))) for n in (hidden, slots))
    gu = k.array(rng.standard_normal((count, 2 * inner, hidden)))
    down = k.array(rng.standard_normal((count, hidden, inner)))
    index = np.stack([rng.permutation(count)[:slots] for _ in range(tokens)]).astype(np.int64)
    y = run_experts(k, x, index, weight, gu, down)
    exact = np.zeros((tokens, hidden))
    for t in range(tokens):
        for s in range(slots):
            wide = k.values(gu[index[t, s]]) @ k.values(x[t])
            mid = act("silu", wide[:inner]) * wide[inner:]
            exact[t] += k.values(weight)[t, s] * (k.values(down[index[t, s]]) @ mid)
    scale = np.abs(exact).max() + 30
    assert (np.abs(k.values(y) - exact) <= scale * (8 * k.eps + 1e-5)).all()
    row = int(rng.integers(tokens))
    one = slice(row, row + 1)
    alone = run_experts(k, x[one].copy(), index[one].copy(), weight[one].copy(), gu, down)
    assert same_bits(alone[0], y[row])
