"""Softmax, top-k, gather, gated activations and experts against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.ops import get_op

from .harness import DTYPES, RUNNABLE, Array, Kernels, kernels, same_bits

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


@settings(max_examples=15)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_elements_are_picked_and_put_by_index(
    dtype: str, rows: int, dim: int, count: int, seed: int
) -> None:
    k = kernels("x86-64-v3", dtype)
    rng = np.random.default_rng(seed)
    x = k.array(rng.standard_normal((rows, dim + 3)))
    index = rng.integers(0, dim, (rows, count))
    picked, put = k.poison(rows, count), k.poison(rows, dim)
    with k.team(2) as team:
        k.call("pick", team, x, dim + 3, index, picked, rows, count)
        k.call("put", team, x, dim + 3, index, put, rows, dim, count, 0.3)
    assert same_bits(picked, np.take_along_axis(x, index, 1))
    wanted = x[:, :dim].copy()
    np.put_along_axis(wanted, index, k.array(np.array(0.3)), 1)
    assert same_bits(put, wanted)


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


GATES = ((1.0, 0.0, 0.0), (1.702, 2.5, 1.0), (1.0, 3.0, 0.0))
"""Alpha, limit and shift of a gate; no limit is the plain one."""


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's experts: elements [E, 2I, H] and [E, H, I], biases or none, and their gate."""

    gate_up: Array
    down: Array
    biases: tuple[Array | None, Array | None]
    gate: tuple[float, float, float]

    @classmethod
    def draw(cls, k: Kernels, rng: np.random.Generator, count: int, choice: int) -> Experts:
        """Random ones of hidden size 34 and inner size 21; `choice` picks the form."""
        hidden, inner = 34, 21
        biased = choice % 2 == 1
        return cls(
            k.array(rng.standard_normal((count, 2 * inner, hidden))),
            k.array(rng.standard_normal((count, hidden, inner))),
            (
                k.array(rng.standard_normal((count, 2 * inner)) * 3) if biased else None,
                k.array(rng.standard_normal((count, hidden)) * 3) if biased else None,
            ),
            GATES[choice // 2],
        )

    def run(self, k: Kernels, x: Array, index: Array, weight: Array) -> Array:
        """By the kernel, into poisoned memory; rows may be floats where the weights are not."""
        tokens, slots = index.shape
        count, hidden, inner = self.down.shape
        shape = (tokens, count, hidden, inner, slots)
        name = "experts" if x.dtype == self.down.dtype else "experts_rounding"
        scratch = np.full(k.call(f"{name}_scratch", *shape), 0xFF, np.uint8)
        y = np.full((tokens, hidden), np.nan, np.float32) if x.dtype == np.float32 else None
        y = k.poison(tokens, hidden) if y is None else y
        packed = (k.pack(self.gate_up), k.pack(self.down))
        needed = max(k.call("linear_scratch", depth) for depth in (hidden, inner))
        with k.team(2, needed) as team:
            inputs = (x, hidden, index, weight, *packed, *self.biases, *self.gate)
            k.call(name, team, *inputs, y, hidden, *shape, scratch)
        return y

    def exact(self, k: Kernels, x: Array, index: Array, weight: Array) -> Array:
        """By the op's meaning; in float64, or where rows are rounded, from float32."""
        alpha, limit, shift = self.gate
        operands = (x, index, weight, self.gate_up, self.down, *self.biases)
        values = [
            torch.from_numpy(index if part is index else k.values(part))
            for part in operands
            if part is not None
        ]
        if x.dtype != self.down.dtype:
            values = [v.float() if v.is_floating_point() else v for v in values]
            values[3:5] = [matrix.bfloat16() for matrix in values[3:5]]
        result = get_op("moe").meaning(
            *values, act="silu", alpha=alpha, limit=limit or None, shift=shift
        )
        assert isinstance(result, torch.Tensor)
        return np.asarray(result.numpy())


@settings(max_examples=12)
@given(
    st.sampled_from(RUNNABLE),
    st.integers(1, 25),
    st.integers(1, 5),
    st.integers(0, 2 * len(GATES) - 1),
    st.integers(0, 2**32),
)
def test_experts_round_rows_of_floats(
    target: str, tokens: int, count: int, choice: int, seed: int
) -> None:
    k = kernels(target, "bf16")
    rng = np.random.default_rng(seed)
    drawn = Experts.draw(k, rng, count, choice)
    up, down = (None if b is None else k.values(b).astype(np.float32) for b in drawn.biases)
    experts = replace(drawn, biases=(up, down))
    x, weight = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (34, 1))
    index = rng.integers(0, count, (tokens, 1))
    y, exact = (run(k, x, index, weight) for run in (experts.run, experts.exact))
    # The activation's last bit may turn the rounding of a row of the second product over.
    assert np.abs(y - exact).max() <= (np.abs(exact).max() + 30) * 0.002
    row = int(rng.integers(tokens))
    one = slice(row, row + 1)
    alone = experts.run(k, x[one].copy(), index[one].copy(), weight[one].copy())
    assert same_bits(alone[0], y[row])


@settings(max_examples=24)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.integers(1, 25),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2 * len(GATES) - 1),
    st.integers(0, 2**32),
)
def test_experts_match_their_meaning_and_rows_stand_alone(
    target: str, dtype: str, tokens: int, count: int, slots: int, choice: int, seed: int
) -> None:
    k = kernels(target, dtype)
    slots = min(slots, count)
    rng = np.random.default_rng(seed)
    experts = Experts.draw(k, rng, count, choice)
    x, weight = (k.array(rng.standard_normal((tokens, n))) for n in (34, slots))
    index = np.stack([rng.permutation(count)[:slots] for _ in range(tokens)]).astype(np.int64)
    y = experts.run(k, x, index, weight)
    exact = experts.exact(k, x, index, weight)
    scale = np.abs(exact).max() + 30
    assert (np.abs(k.values(y) - exact) <= scale * (8 * k.eps + 1e-5)).all()
    row = int(rng.integers(tokens))
    one = slice(row, row + 1)
    alone = experts.run(k, x[one].copy(), index[one].copy(), weight[one].copy())
    assert same_bits(alone[0], y[row])
