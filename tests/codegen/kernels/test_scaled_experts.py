"""Experts over codes against their meaning, and each row against itself alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.ops import get_op

from .harness import DTYPES, RUNNABLE, Array, Kernels, same_bits
from .test_scaled_linear import Matrix, build, entry

HIDDEN, INNER = 34, 21
SHARED = ("int8", "int4", "int4-g128", "int8-token", "int4-token")
"""Schemes with a kernel for experts here; those of GGUF differ in their types of scales alone."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Codes [E, 2I, H] and [E, H, I], each with scales; biases or none."""

    gate_up: Matrix
    down: Matrix
    biases: tuple[Array | None, Array | None]

    @classmethod
    def draw(
        cls, k: Kernels, rng: np.random.Generator, scheme: str, count: int, biased: bool
    ) -> Experts:
        def bias(size: int) -> Array | None:
            return k.array(rng.standard_normal((count, size))) if biased else None

        up = Matrix.draw(rng, scheme, count, 2 * INNER, HIDDEN)
        down = Matrix.draw(rng, scheme, count, HIDDEN, INNER)
        return cls(up, down, (bias(2 * INNER), bias(HIDDEN)))

    def run(self, k: Kernels, x: Array, index: Array, weight: Array, threads: int) -> Array:
        """By the kernel, into poisoned memory."""
        tokens, slots = index.shape
        shape = (tokens, len(self.down.codes), HIDDEN, INNER, slots)
        scratch = np.full(k.call("moe_scratch", *shape), 0xFF, np.uint8)
        y = k.poison(tokens, HIDDEN)
        packed = [(w.packed(k), w.scales) for w in (self.gate_up, self.down)]
        needed = max(k.call("linear_scratch", depth) for depth in (HIDDEN, INNER))
        with k.team(threads, needed) as team:
            inputs = (x, HIDDEN, index, weight, *packed[0], *packed[1], *self.biases)
            k.call(f"experts_{entry(self.down.scheme)}", team, *inputs, y, HIDDEN, *shape, scratch)
        return y

    def exact(self, k: Kernels, x: Array, index: Array, weight: Array) -> Array:
        """By the op's meaning, in the kernels' element type."""

        def elements(part: Array) -> torch.Tensor:
            kind = torch.float32 if k.dtype == "float" else torch.bfloat16
            return torch.from_numpy(k.values(part)).to(kind)

        both = self.gate_up, self.down
        matrices = (torch.from_numpy(part) for w in both for part in (w.codes, w.scales))
        biases = (elements(bias) for bias in self.biases if bias is not None)
        operands = (elements(x), torch.from_numpy(index), elements(weight), *matrices, *biases)
        gate = {"act": "silu", "alpha": 1.0, "limit": None, "shift": 0.0}
        result = get_op("scaled_moe").meaning(*operands, scheme=self.down.scheme, **gate)
        assert isinstance(result, torch.Tensor)
        return np.asarray(result.double().numpy())


@settings(max_examples=24)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(SHARED),
    st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 3)),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_experts_match_their_meaning_and_rows_stand_alone(
    target: str, dtype: str, scheme: str, sizes: tuple[int, int, int], biased: bool, seed: int
) -> None:
    k = build(target, dtype)
    tokens, count, slots = sizes
    slots = min(slots, count)
    rng = np.random.default_rng(seed)
    experts = Experts.draw(k, rng, scheme, count, biased)
    x, weight = (k.array(rng.standard_normal((tokens, n))) for n in (HIDDEN, slots))
    index = np.stack([rng.permutation(count)[:slots] for _ in range(tokens)]).astype(np.int64)
    y = experts.run(k, x, index, weight, 2)
    exact = experts.exact(k, x, index, weight)
    # The activation's last bit may turn a code of the second product over, by one step of 127.
    error = np.abs(k.values(y) - exact)
    assert error.max() <= np.abs(exact).max() * 0.02
    assert np.median(error) <= np.abs(exact).max() * (2 * k.eps + 1e-6)
    assert same_bits(experts.run(k, x, index, weight, 3), y)
    row = int(rng.integers(tokens))
    one = slice(row, row + 1)
    alone = experts.run(k, x[one].copy(), index[one].copy(), weight[one].copy(), 1)
    assert same_bits(alone[0], y[row])
