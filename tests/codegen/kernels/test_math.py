"""Elementary functions: errors in units of the last place, and one set of bits for 1 and 16."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from .harness import Array, Kernels, same_bits, to_bf16

SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-38,
    -1e-38,
    3e38,
    -3e38,
    88.7,
    89.5,
    -87.3,
    -103.0,
]


def sample(low: float, high: float) -> Array:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.uniform(low, high, 40_000), rng.standard_normal(9_991) * min(1.0, high)]
    )
    return values.clip(low, high).astype(np.float32)


def evaluate(k: Kernels, name: str, x: Array) -> Array:
    one, many = np.full_like(x, np.nan), np.full_like(x, np.nan)
    k.call(f"math_{name}", x, one, many, x.size)
    nan = np.isnan(one)
    assert (nan == np.isnan(many)).all()
    assert same_bits(one[~nan], many[~nan]), "a float and sixteen of them differ"
    return one


def wide(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Array], Array]:
    return lambda x: np.asarray(function(torch.from_numpy(x.astype(np.float64))).numpy())


# name, float64 meaning, range, largest error in ulp with and without FMA
CASES = [
    ("exp", wide(torch.exp), -87.0, 88.0, 1.0, 1.3),
    ("sigmoid", wide(torch.sigmoid), -80.0, 80.0, 2.6, 2.6),
    ("silu", wide(torch.nn.functional.silu), -80.0, 80.0, 2.5, 2.5),
    ("tanh", wide(torch.tanh), -12.0, 12.0, 1.5, 1.5),
    ("erf", wide(torch.erf), -6.0, 6.0, 1.1, 1.3),
    ("log", wide(torch.log), 1e-30, 50.0, 0.9, 0.9),
    ("softplus", wide(lambda x: torch.logaddexp(x, torch.zeros_like(x))), -80.0, 80.0, 3.0, 3.0),
    ("rsqrt", wide(torch.rsqrt), 1e-30, 50.0, 1.6, 1.6),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c[0]))
def test_error_in_ulp(float_kernels: Kernels, case: tuple[object, ...]) -> None:
    name, meaning, low, high, with_fma, without = case
    assert isinstance(name, str) and callable(meaning)
    assert isinstance(low, float) and isinstance(high, float)
    x = sample(low, high)
    exact = meaning(x)
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error = np.abs(evaluate(float_kernels, name, x) - exact) / ulp
    worst = int(error.argmax())
    bound = with_fma if float_kernels.target.has("fma") else without
    assert error[worst] <= bound, f"{name}({x[worst]!r}) is {error[worst]:.2f} ulp off"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_as_near_as_pytorch(float_kernels: Kernels, approximate: str) -> None:
    x = sample(-12.0, 12.0)
    exact = wide(lambda v: torch.nn.functional.gelu(v, approximate=approximate))(x)
    y = evaluate(float_kernels, "gelu" if approximate == "none" else "gelu_tanh", x)
    # Towards -inf the formula subtracts two ones, in PyTorch too: the error is absolute there.
    assert (np.abs(y - exact) <= 4 * 2.0**-24 * np.maximum(np.abs(x), np.abs(exact))).all()


def test_special_values(float_kernels: Kernels) -> None:
    x = np.array(SPECIAL, np.float32)
    exact: dict[str, Callable[[float], float]] = {
        "exp": lambda v: math.inf if v > 88.73 else math.exp(v),
        "tanh": math.tanh,
        "erf": math.erf,
        "relu": lambda v: v if v > 0 or math.isnan(v) else 0.0,
        "sigmoid": lambda v: 0.0 if v < -700 else 1 / (1 + math.exp(-v)),
    }
    for name, meaning in exact.items():
        y = evaluate(float_kernels, name, x)
        expected = np.array([meaning(float(v)) for v in x])
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-37, err_msg=name)
    logs = evaluate(float_kernels, "log", np.array([0, -1, np.inf, np.nan, 1, 1e-40], np.float32))
    np.testing.assert_allclose(logs, [-np.inf, np.nan, np.inf, np.nan, 0, -92.10345], rtol=1e-5)


def test_rounding_to_bf16_is_pytorchs(float_kernels: Kernels) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000
    x = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    one, many = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint16)
    float_kernels.call("math_bf16", x, one, many, x.size)
    nan = np.isnan(x)
    assert same_bits(one, many)
    assert same_bits(one[~nan], to_bf16(x)[~nan])
    assert ((one[nan] & 0x7FFF) > 0x7F80).all(), "a NaN stays a NaN"
