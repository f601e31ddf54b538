"""Kernels that Triton compiled, beside what numpy and torch compute; outputs begin as NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from .conftest import Compile
from .running import Box, Compiled, device, run

Array = NDArray[Any]

TYPES = {
    "bf16": ("*bf16", torch.bfloat16),
    "fp16": ("*fp16", torch.float16),
    "tf32": ("*fp32", torch.float32),
    "fp32": ("*fp32", torch.float32),
    "i8": ("*i8", torch.int8),
    "fp8": ("*fp8e4nv", torch.float8_e4m3fn),
}


def raw(tensor: torch.Tensor) -> Array:
    """The bytes of a tensor, row by row."""
    return tensor.contiguous().view(torch.uint8).numpy()


def poisoned(*shape: int, dtype: Any = np.float32) -> Array:
    """Memory that a kernel should have written."""
    fresh: Array = (
        np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        .view(dtype)
        .reshape(shape)
    )
    return fresh


def compile_product(
    compile_triton: Compile, kind: str, capability: int, rows: int, **options: Any
) -> Compiled:
    pointer = TYPES[kind][0]
    integer = kind == "i8"
    types = {"x": pointer, "w": pointer, "y": "*i32" if integer else "*fp32"}
    types |= dict.fromkeys("MNK", "i32")
    constants: dict[str, Any] = {"BM": rows, "BN": 64, "BK": 64, "EXACT": kind == "fp32"}
    constants["TYPE"] = "int32" if integer else "float32"
    return compile_triton("product", capability, types, constants, **options)


CASES = [
    (kind, capability, rows)
    for kind in TYPES
    for capability in (80, 90)
    for rows in (16, 64)
    if not (kind == "fp8" and capability == 80)
]


@pytest.mark.parametrize(
    ("kind", "capability", "rows"), [*CASES, ("fp8", 89, 16), ("bf16", 90, 128), ("i8", 90, 128)]
)
def test_products_of_tensor_cores(
    compile_triton: Compile, kind: str, capability: int, rows: int
) -> None:
    m, n, k = 37, 112, 208  # none is a multiple of its tile
    generator = torch.Generator().manual_seed(0)
    if kind == "i8":
        x, w = (
            torch.randint(-128, 128, s, generator=generator).to(torch.int8)
            for s in ((m, k), (n, k))
        )
        wanted = (x.to(torch.int32) @ w.to(torch.int32).T).numpy()
    else:
        x, w = (torch.randn(s, generator=generator).to(TYPES[kind][1]) for s in ((m, k), (n, k)))
        wanted = (x.double() @ w.double().T).numpy()
    # 128 rows take two groups of four warps.
    options = {"num_warps": 8} if rows == 128 else {}
    compiled = compile_product(compile_triton, kind, capability, rows, **options)
    y = poisoned(m, n, dtype=np.int32 if kind == "i8" else np.float32)
    found = run(
        compiled,
        {"x": raw(x), "w": raw(w), "y": y},
        ["x", "w", "y", m, n, k],
        (-(-m // rows), -(-n // 64)),
        driver=device(capability),
        extra_pointers=2,
    )["y"]
    tolerance = {"tf32": 2e-3, "i8": 0.0}.get(kind, 2e-6)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_boxes_that_the_tensor_memory_accelerator_copies(compile_triton: Compile) -> None:
    m, n, k = 100, 72, 136
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(s, generator=generator).bfloat16() for s in ((m, k), (n, k)))
    wanted = (x.float() @ w.float().T).bfloat16()
    compiled = compile_boxes(compile_triton)
    found = run_boxes(compiled, x, w)
    assert np.allclose(as_float(found), wanted.float().numpy(), rtol=2**-7, atol=1e-3)


def compile_boxes(compile_triton: Compile) -> Compiled:
    tile = "tensordesc<bf16[64, 64]>"
    types = {"x": tile, "w": tile, "y": tile, "K": "i32"}
    return compile_triton("product_of_boxes", 90, types, {"BM": 64, "BN": 64, "BK": 64})


def run_boxes(compiled: Compiled, x: torch.Tensor, w: torch.Tensor) -> Array:
    (m, k), n = x.shape, w.shape[0]
    arrays = {"x": x.view(torch.int16).numpy(), "w": w.view(torch.int16).numpy()}
    arrays["y"] = np.full((m, n), -1, np.int16)
    boxes = [Box(name, (64, 64), "bf16") for name in arrays]
    grid = (-(-m // 64), -(-n // 64))
    return run(compiled, arrays, [*boxes, k], grid, extra_pointers=2)["y"]


def as_float(bits: Array) -> Array:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("capability", [80, 90])
def test_attention(compile_triton: Compile, capability: int) -> None:
    length, width = 83, 64
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(length, width, generator=generator).bfloat16() for _ in range(3))
    types = {**dict.fromkeys("qkv", "*bf16"), "y": "*fp32", "L": "i32"}
    compiled = compile_triton("attention", capability, types, {"D": width, "BQ": 64, "BK": 32})
    arrays = {"q": raw(q), "k": raw(k), "v": raw(v), "y": poisoned(length, width)}
    found = run(
        compiled,
        arrays,
        ["q", "k", "v", "y", length],
        (2,),
        driver=device(capability),
        extra_pointers=2,
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q[None].float(), k[None].float(), v[None].float(), is_causal=True
    )[0]
    assert np.abs(found["y"] - wanted.numpy()).max() < 0.02


def test_norms_of_odd_rows(compile_triton: Compile) -> None:
    rows, width = 5, 201
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=generator).bfloat16()
    w = torch.randn(width, generator=generator).bfloat16()
    compiled = compile_triton(
        "normalized", 80, dict.fromkeys("xwy", "*bf16"), {"H": width, "B": 256}
    )
    arrays = {"x": raw(x), "w": raw(w), "y": poisoned(rows, width, dtype=np.uint16)}
    found = run(compiled, arrays, ["x", "w", "y"], (rows,), driver=device(80), extra_pointers=2)[
        "y"
    ]
    wanted = torch.nn.functional.rms_norm(x.float(), (width,), w.float(), 1e-6).bfloat16()
    assert np.allclose(as_float(found), wanted.float().numpy(), rtol=2**-7)


def test_scans_and_sorting(compile_triton: Compile) -> None:
    x = np.random.default_rng(4).standard_normal(250).astype(np.float32)
    types = {"x": "*fp32", "y": "*fp32", "order": "*i32", "sorted_": "*fp32", "n": "i32"}
    compiled = compile_triton("scans", 80, types, {"B": 256})
    arrays = {
        "x": x,
        "y": poisoned(250),
        "order": poisoned(2, dtype=np.int32),
        "sorted_": poisoned(256),
    }
    found = run(
        compiled, arrays, ["x", "y", "order", "sorted_", 250], driver=device(80), extra_pointers=2
    )
    assert np.allclose(found["y"], np.cumsum(x), atol=1e-5)
    assert found["order"][0] == x.argmax()
    assert found["order"][1:].view(np.float32)[0] == x.max()
    assert found["sorted_"].tolist() == [-np.inf] * 6 + sorted(x.tolist())


@pytest.mark.parametrize("capability", [80, 90])
def test_atomic_operations(compile_triton: Compile, capability: int) -> None:
    x = np.random.default_rng(5).integers(0, 1 << 20, 1000, dtype=np.int32)
    compiled = compile_triton(
        "counts", capability, {"x": "*i32", "y": "*i32", "n": "i32"}, {"B": 256}
    )
    arrays = {"x": x, "y": np.zeros(68, np.int32)}
    found = run(
        compiled, arrays, ["x", "y", 1000], (4,), driver=device(capability), extra_pointers=2
    )["y"]
    assert (found[:64] == np.bincount(x & 63, minlength=64)).all()
    assert found[64:].tolist() == [x.max(), 1, 7, 3]


def test_functions_of_floats(compile_triton: Compile) -> None:
    x = np.random.default_rng(6).uniform(-3, 3, 333).astype(np.float32)
    compiled = compile_triton("functions", 80, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"B": 128})
    arrays = {"x": x, "y": poisoned(8, 333)}
    found = run(compiled, arrays, ["x", "y", 333], (3,), driver=device(80), extra_pointers=2)["y"]
    wide = x.astype(np.float64)
    wanted = [
        np.exp(wide),
        np.log(np.abs(wide)),
        1 / np.sqrt(np.abs(wide)),
        torch.erf(torch.from_numpy(wide)).numpy(),
        np.floor(wide),
        np.rint(wide),
        1 / wide,
        wide * wide - wide,
    ]
    for one, expected in zip(found, wanted, strict=True):
        assert np.allclose(one, expected, rtol=3e-6, atol=1e-6)


def test_integers_of_64_bits(compile_triton: Compile) -> None:
    x = np.random.default_rng(7).integers(-(2**63), 2**63, 100, dtype=np.int64)
    compiled = compile_triton(
        "wide_integers", 80, {"x": "*i64", "y": "*i64", "n": "i32"}, {"B": 128}
    )
    arrays = {"x": x, "y": poisoned(3, 100, dtype=np.int64)}
    found = run(compiled, arrays, ["x", "y", 100], driver=device(80), extra_pointers=2)["y"]
    for place, value in enumerate(x.tolist()):
        high = (value % 2**64) * 0xD2E7470EE14C6C93 >> 64
        assert int(found[0, place]) % 2**64 == high
        quotient = abs(value) // 1000003 * (1 if value >= 0 else -1)
        assert found[1:, place].tolist() == [quotient, value - quotient * 1000003]


@pytest.mark.parametrize("capability", [89, 90])
def test_floats_of_eight_bits(compile_triton: Compile, capability: int) -> None:
    x = np.random.default_rng(8).standard_normal(777).astype(np.float32) * 60
    x[:3] = [1e9, -1e9, 2**-10]
    types = {"x": "*fp32", "y": "*fp8e4nv", "z": "*bf16", "n": "i32"}
    compiled = compile_triton("eight_bits", capability, types, {"B": 512})
    arrays = {"x": x, "y": poisoned(777, dtype=np.uint8), "z": poisoned(777, dtype=np.uint16)}
    found = run(
        compiled, arrays, ["x", "y", "z", 777], (2,), driver=device(capability), extra_pointers=2
    )
    if capability == 89:  # Triton goes by way of float16 there, which it truncates to
        size = np.minimum(np.abs(x), 448.0).view(np.uint32) & np.uint32(0xFFFFE000)
        x = np.copysign(size.view(np.float32), x)
    wanted = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn)
    assert found["y"].tolist() == wanted.view(torch.uint8).tolist()
    assert (as_float(found["z"]) == wanted.float().numpy()).all()


def test_numbers_of_four_bits(compile_triton: Compile) -> None:
    generator = np.random.default_rng(9)
    x = generator.integers(0, 256, 500, dtype=np.uint8)
    scales = torch.from_numpy(generator.uniform(1, 30, 32).astype(np.float32)).bfloat16()
    types = {"x": "*u8", "scales": "*bf16", "y": "*i8", "n": "i32"}
    compiled = compile_triton("four_bits", 80, types, {"B": 512})
    arrays = {"x": x, "scales": raw(scales), "y": poisoned(1000, dtype=np.int8)}
    found = run(
        compiled, arrays, ["x", "scales", "y", 1000], (2,), driver=device(80), extra_pointers=2
    )["y"]
    values = np.stack([x & 15, x >> 4], 1).reshape(-1).astype(np.float32) - 8
    scaled = np.rint(values * np.repeat(scales.float().numpy(), 32)[:1000])
    assert (found == np.clip(scaled, -127, 127)).all()
