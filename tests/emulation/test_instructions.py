"""Each family of instructions in hand-written kernels, beside numpy and Python."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from .floats import eight_bit_values, from_bfloat16, to_bfloat16, to_eight_bits
from .running import device, elementwise, run, written

Array = NDArray[Any]

GENERATOR = np.random.default_rng(0)
WORDS = np.concatenate(
    [
        np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000], np.uint32),
        GENERATOR.integers(0, 2**32, 22, dtype=np.uint32),
    ]
)
LONGS = WORDS.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
FLOATS = np.array(
    [
        *(
            0.0,
            -0.0,
            1.0,
            -1.5,
            2.5,
            3.5,
            np.inf,
            -np.inf,
            np.nan,
            1e-40,
            3e38,
            65520.0,
            0.1,
            -7.25,
        ),
        *GENERATOR.standard_normal(18).tolist(),
    ],
    np.float32,
)


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


INTEGERS: dict[str, Callable[[int], int]] = {
    "add.s32 %r2, %r1, -5;": lambda x: x - 5,
    "sub.u32 %r2, 7, %r1;": lambda x: 7 - x,
    "mul.lo.s32 %r2, %r1, 12345;": lambda x: x * 12345,
    "mul.hi.u32 %r2, %r1, 3735928559;": lambda x: x * 3735928559 >> 32,
    "mul.hi.s32 %r2, %r1, -77;": lambda x: signed(x) * -77 >> 32,
    "mad.lo.u32 %r2, %r1, %r1, 9;": lambda x: x * x + 9,
    "mul.wide.s32 %rd1, %r1, -3; shr.u64 %rd1, %rd1, 8; cvt.u32.u64 %r2, %rd1;": (
        lambda x: (signed(x) * -3) % 2**64 >> 8
    ),
    "mul.wide.u32 %rd1, %r1, 9; mov.b64 {%r3, %r2}, %rd1;": lambda x: x * 9 >> 32,
    "div.u32 %r2, %r1, 7;": lambda x: x // 7,
    "div.s32 %r2, %r1, 7;": lambda x: abs(signed(x)) // 7 * (-1 if signed(x) < 0 else 1),
    "rem.s32 %r2, %r1, 7;": lambda x: abs(signed(x)) % 7 * (-1 if signed(x) < 0 else 1),
    "min.s32 %r2, %r1, 5;": lambda x: min(signed(x), 5),
    "max.u32 %r2, %r1, 5;": lambda x: max(x, 5),
    "and.b32 %r3, %r1, 255; xor.b32 %r2, %r3, 85;": lambda x: (x & 255) ^ 85,
    "not.b32 %r2, %r1;": lambda x: ~x,
    "neg.s32 %r2, %r1;": lambda x: -x,
    "abs.s32 %r2, %r1;": lambda x: abs(signed(x)),
    "shl.b32 %r2, 1, %r1;": lambda x: 1 << x if x < 32 else 0,
    "shr.u32 %r2, -1, %r1;": lambda x: 0xFFFFFFFF >> x if x < 32 else 0,
    "shr.s32 %r2, %r1, 40;": lambda x: signed(x) >> 31,
    "shf.l.wrap.b32 %r2, %r1, 3, 5;": lambda x: (3 << 32 | x) << 5 >> 32,
    "shf.r.clamp.b32 %r2, %r1, 3, 5;": lambda x: (3 << 32 | x) >> 5,
    "popc.b32 %r2, %r1;": lambda x: x.bit_count(),
    "clz.b32 %r2, %r1;": lambda x: 32 - x.bit_length(),
    "brev.b32 %r2, %r1;": lambda x: int(f"{x:032b}"[::-1], 2),
    "bfe.u32 %r2, %r1, 5, 9;": lambda x: x >> 5 & 511,
    "bfe.s32 %r2, %r1, 28, 9;": lambda x: signed(x) >> 28,
    "bfe.s32 %r2, %r1, 4, 4;": lambda x: signed(x >> 4 & 15, 4),
    "bfe.u32 %r2, %r1, 3, 0;": lambda x: 0,
    "bfi.b32 %r2, %r1, -1, 8, 4;": lambda x: 0xFFFFF0FF | (x & 15) << 8,
    "prmt.b32 %r2, %r1, 287454020, 0x7150;": (
        lambda x: (x & 255) | 0x33 << 8 | (x >> 8 & 255) << 16 | 0x11 << 24
    ),
    "prmt.b32 %r2, %r1, 0, 0x8;": lambda x: (255 if x & 128 else 0) | (x & 255) * 0x01010100,
    "lop3.b32 %r2, %r1, 1234567, 89, 0xCA;": lambda x: (x & 1234567) | (~x & 89),
    "setp.lt.s32 %p1, %r1, 4; selp.b32 %r2, 10, 20, %p1;": lambda x: 10 if signed(x) < 4 else 20,
    "setp.hi.u32 %p1|%p2, %r1, 31; selp.b32 %r2, 1, 0, %p2;": lambda x: int(x <= 31),
    "setp.ge.u32 %p1, %r1, 2; setp.le.and.u32 %p2, %r1, 33, %p1; selp.b32 %r2, 1, 0, %p2;": (
        lambda x: int(2 <= x <= 33)
    ),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};": lambda x: x >> 16 | x << 16,
    "cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r2, %rs1;": lambda x: signed(x & 0xFFFF, 16),
    "cvt.s32.s8 %r2, %r1;": lambda x: signed(x & 255, 8),
    "mov.b32 %r2, 5; setp.eq.b32 %p1, %r1, 1; @!%p1 mov.b32 %r2, 6;": lambda x: 5 if x == 1 else 6,
}


@pytest.mark.parametrize("statements", INTEGERS)
def test_integers(statements: str) -> None:
    found = run(elementwise(statements), {"x": WORDS, "y": WORDS * 0}, ["x", "y"])["y"]
    assert found.tolist() == [INTEGERS[statements](x) % 2**32 for x in WORDS.tolist()]


LONG: dict[str, Callable[[int], int]] = {
    "mul.lo.s64 %rd2, %rd1, %rd1;": lambda x: x * x,
    "mul.hi.u64 %rd2, %rd1, %rd1;": lambda x: x * x >> 64,
    "mul.hi.s64 %rd2, %rd1, -12345678901;": lambda x: signed(x, 64) * -12345678901 >> 64,
    "shr.u64 %rd2, %rd1, 11;": lambda x: x >> 11,
    "shl.b64 %rd2, %rd1, 33;": lambda x: x << 33,
    "div.s64 %rd2, %rd1, 1000;": (
        lambda x: abs(signed(x, 64)) // 1000 * (-1 if signed(x, 64) < 0 else 1)
    ),
    "popc.b64 %r1, %rd1; cvt.u64.u32 %rd2, %r1;": lambda x: x.bit_count(),
    "clz.b64 %r1, %rd1; cvt.u64.u32 %rd2, %r1;": lambda x: 64 - x.bit_length(),
    "cvt.u32.u64 %r1, %rd1; cvt.s64.s32 %rd2, %r1;": lambda x: signed(x % 2**32),
    "mov.b64 {%r1, %r2}, %rd1; mov.b64 %rd2, {%r2, %r1};": lambda x: x >> 32 | x << 32,
    "bfi.b64 %rd2, %rd1, 0, 60, 4;": lambda x: x << 60,
    "cvt.u32.u64 %r1, %rd1; mov.b64 %rd2, 7; mad.wide.s32 %rd2, %r1, 3, %rd2;": (
        lambda x: signed(x % 2**32) * 3 + 7
    ),
}


@pytest.mark.parametrize("statements", LONG)
def test_integers_of_64_bits(statements: str) -> None:
    compiled = elementwise(statements, element_bytes=8)
    found = run(compiled, {"x": LONGS, "y": LONGS * 0}, ["x", "y"])["y"]
    assert found.tolist() == [LONG[statements](x) % 2**64 for x in LONGS.tolist()]


def fused(x: Array) -> Array:
    return (x.astype(np.float64) * x + 0.1875).astype(np.float32)


REALS: dict[str, Callable[[Array], Array]] = {
    "add.f32 %r2, %r1, 0f3FC00000;": lambda x: x + np.float32(1.5),
    "mul.f32 %r2, %r1, %r1;": lambda x: x * x,
    "fma.rn.f32 %r2, %r1, %r1, 0f3E400000;": fused,
    "min.f32 %r2, %r1, 0f3F800000;": lambda x: np.fmin(x, np.float32(1)),
    "max.NaN.f32 %r2, %r1, 0f3F800000;": lambda x: np.maximum(x, np.float32(1)),
    "max.f32 %r2, %r1, 0f3F800000;": lambda x: np.fmax(x, np.float32(1)),
    "neg.f32 %r2, %r1;": lambda x: -x,
    "abs.f32 %r2, %r1;": np.abs,
    "add.sat.f32 %r2, %r1, 0f00000000;": lambda x: np.nan_to_num(np.clip(x + np.float32(0), 0, 1)),
    "div.full.f32 %r2, 0f3F800000, %r1;": lambda x: np.float32(1) / x,
    "sqrt.rn.f32 %r2, %r1;": np.sqrt,
    "rsqrt.approx.ftz.f32 %r2, %r1;": lambda x: 1 / np.sqrt(x),
    "rcp.rn.f32 %r2, %r1;": lambda x: 1 / x,
    "ex2.approx.f32 %r2, %r1;": np.exp2,
    "lg2.approx.f32 %r2, %r1;": np.log2,
    "tanh.approx.f32 %r2, %r1;": np.tanh,
    "copysign.f32 %r2, %r1, 0f40000000;": lambda x: np.copysign(np.float32(2), x),
    "cvt.rni.f32.f32 %r2, %r1;": np.rint,
    "cvt.rmi.f32.f32 %r2, %r1;": np.floor,
    "cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r2, %rs1;": (
        lambda x: x.astype(np.float16).astype(np.float32)
    ),
    "cvt.rz.f16.f32 %rs1, %r1; cvt.f32.f16 %r2, %rs1;": (
        lambda x: np.where(np.abs(x) == np.float32(65520), np.float32(65504), truncated(x))
    ),
    "cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r2, %rs1;": (
        lambda x: torch.from_numpy(x).bfloat16().float().numpy()
    ),
    "cvt.f64.f32 %rd1, %r1; mul.f64 %rd1, %rd1, %rd1; cvt.rn.f32.f64 %r2, %rd1;": (
        lambda x: (x.astype(np.float64) ** 2).astype(np.float32)
    ),
    "setp.lt.f32 %p1, %r1, 0f3F800000; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": (
        lambda x: (x < 1).astype(np.float32)
    ),
    "setp.geu.f32 %p1, %r1, 0f3F800000; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": (
        lambda x: (~(x < 1)).astype(np.float32)
    ),
    "setp.ne.f32 %p1, %r1, %r1; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": lambda x: x * 0 == 1,
    "setp.neu.f32 %p1, %r1, %r1; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": np.isnan,
    "setp.nan.f32 %p1, %r1, %r1; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": np.isnan,
    "setp.num.f32 %p1, %r1, %r1; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;": lambda x: x == x,
}


def truncated(x: Array) -> Array:
    """float16 toward zero: the float's mantissa without its last 13 bits, below the largest."""
    cut = (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    near = np.where(np.abs(x) < 6.2e-5, x.astype(np.float16).astype(np.float32), cut)
    over = np.isfinite(x) & (np.abs(x) > 65504)
    return np.where(over, np.copysign(np.float32(65504), x), near)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("statements", REALS)
def test_floats(statements: str) -> None:
    arrays = {"x": FLOATS, "y": np.zeros(32, np.float32)}
    found = run(elementwise(statements), arrays, ["x", "y"])["y"]
    wanted = np.asarray(REALS[statements](FLOATS)).astype(np.float32)
    if "approx" in statements:
        assert np.allclose(found, wanted, rtol=1e-6, equal_nan=True)
    else:
        assert np.array_equal(found, wanted, equal_nan=True)
        numbers = ~np.isnan(wanted)
        assert (np.signbit(found) == np.signbit(wanted))[numbers].all()


@pytest.mark.parametrize(("kind", "low", "high"), [("s32", -(2**31), 2**31 - 1), ("u8", 0, 255)])
def test_floats_to_integers(kind: str, low: int, high: int) -> None:
    arrays = {"x": FLOATS, "y": np.zeros(32, np.int32)}
    found = run(elementwise(f"cvt.rzi.{kind}.f32 %r2, %r1;"), arrays, ["x", "y"])["y"]
    for value, result in zip(FLOATS.tolist(), found.tolist(), strict=True):
        if value != value:
            assert result == 0
        else:
            assert result == (low if value < low else high if value > high else int(value))


@pytest.mark.parametrize("kind", ["bf16x2", "f16x2"])
def test_pairs(kind: str) -> None:
    x = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16
    halves = torch.from_numpy(x).to(dtype)
    arrays = {"x": halves.view(torch.int32).numpy(), "y": np.zeros(32, np.int32)}
    found = run(elementwise(f"fma.rn.{kind} %r2, %r1, %r1, %r1;"), arrays, ["x", "y"])["y"]
    wanted = (halves.double() * halves.double() + halves.double()).to(dtype)
    assert torch.equal(torch.from_numpy(found).view(dtype), wanted)
    one = kind.removesuffix("x2")
    body = f"mov.b32 {{%rs1, %rs2}}, %r1; cvt.f32.{one} %r3, %rs1; cvt.f32.{one} %r4, %rs2;"
    body += f"cvt.rn.{kind}.f32 %r2, %r4, %r3;"
    assert (run(elementwise(body), arrays, ["x", "y"])["y"] == arrays["x"]).all()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_floats_of_eight_bits_are_those_of_torch(kind: str) -> None:
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    patterns = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(patterns).view(dtype).float().numpy()
    assert np.array_equal(eight_bit_values(kind), wanted, equal_nan=True)
    x = np.random.default_rng(2).standard_normal(5000).astype(np.float32) * 20
    x = np.concatenate([x, wanted[np.isfinite(wanted)], x * np.float32(1e-3)])
    midpoints = (wanted[:126].astype(np.float64) + wanted[1:127]) / 2
    x = np.concatenate([x, midpoints[np.isfinite(midpoints)].astype(np.float32)])
    limit = 448 if kind == "e4m3" else 57344
    rounded = torch.from_numpy(np.clip(x, -limit, limit)).to(dtype).view(torch.uint8).numpy()
    assert (to_eight_bits(kind, x) == rounded).all()
    bits = np.random.default_rng(3).integers(0, 2**32, 99, dtype=np.uint32).view(np.float32)
    assert np.array_equal(
        from_bfloat16(to_bfloat16(bits)),
        torch.from_numpy(bits).bfloat16().float().numpy(),
        equal_nan=True,
    )


WARPS: dict[str, Callable[[Array], Array]] = {
    "shfl.sync.bfly.b32 %r2, %r1, 3, 31, -1;": lambda x: x[:, np.arange(32) ^ 3],
    "shfl.sync.up.b32 %r2, %r1, 5, 0, -1;": (
        lambda x: np.where(np.arange(32) < 5, x, np.roll(x, 5, 1))
    ),
    "shfl.sync.down.b32 %r2, %r1, 5, 31, -1;": (
        lambda x: np.where(np.arange(32) > 26, x, np.roll(x, -5, 1))
    ),
    "shfl.sync.idx.b32 %r2, %r1, 9, 31, -1;": lambda x: np.repeat(x[:, 9:10], 32, 1),
    "shfl.sync.idx.b32 %r2, %r1, 2, 6175, -1;": (  # segments of eight lanes
        lambda x: x[:, np.arange(32) // 8 * 8 + 2]
    ),
    "and.b32 %r5, %r1, 31; shfl.sync.idx.b32 %r2, %r1, %r5, 31, -1;": (
        lambda x: np.take_along_axis(x, (x & 31).astype(int), 1)
    ),
    "shfl.sync.down.b32 %r3|%p1, %r1, 8, 31, -1; selp.b32 %r2, 1, 0, %p1;": (
        lambda x: (np.arange(32) < 24) * (x * 0 + 1)
    ),
    "setp.gt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r2, %p1, -1;": (
        lambda x: ((x.view(np.int32) > 0) << np.arange(32)).sum(1)[:, None] + x * 0
    ),
    "setp.gt.u32 %p1, %r1, 5; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;": (
        lambda x: np.asarray((x > 5).all(1))[:, None] + x * 0
    ),
    "setp.eq.u32 %p1, %r1, 31; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;": (
        lambda x: np.asarray((x == 31).any(1))[:, None] + x * 0
    ),
    "redux.sync.add.s32 %r2, %r1, -1;": lambda x: x.sum(1, dtype=np.uint32)[:, None] + x * 0,
    "redux.sync.max.s32 %r2, %r1, -1;": lambda x: x.view(np.int32).max(1)[:, None] + x * 0,
    "redux.sync.min.u32 %r2, %r1, -1;": lambda x: x.min(1)[:, None] + x * 0,
    "redux.sync.xor.b32 %r2, %r1, -1;": lambda x: np.bitwise_xor.reduce(x, 1)[:, None] + x * 0,
    "elect.sync %r3|%p1, -1; selp.b32 %r2, 1, 0, %p1;": lambda x: (np.arange(32) == 0) + x * 0,
}


@pytest.mark.parametrize("statements", WARPS)
def test_threads_of_a_warp(statements: str) -> None:
    x = np.concatenate([WORDS, WORDS[::-1] ^ np.uint32(77)])
    arrays = {"x": x, "y": x * 0}
    compiled = elementwise(statements, threads=64)
    found = run(compiled, arrays, ["x", "y"], driver=device(80))["y"]
    wanted = WARPS[statements](x.reshape(2, 32)).astype(np.uint32).reshape(-1)
    assert found.tolist() == wanted.tolist()


def test_threads_that_part_meet_again() -> None:
    body = """and.b32 %r5, %r1, 3;
mov.b32 %r2, 0;
$L_loop: setp.eq.u32 %p1, %r5, 0; @%p1 bra $L_done;
add.s32 %r2, %r2, %r1; sub.s32 %r5, %r5, 1; bra.uni $L_loop;
$L_done: setp.gt.u32 %p2, %r1, 2147483647; @%p2 bra $L_high;
add.s32 %r2, %r2, 1; bra.uni $L_end;
$L_high: xor.b32 %r2, %r2, -1;
$L_end: shfl.sync.bfly.b32 %r2, %r2, 1, 31, -1;"""
    body = body.replace(": ", ":\n")
    compiled = elementwise(body.replace("$L_loop:\n", "\n$L_loop:\n"))
    found = run(compiled, {"x": WORDS, "y": WORDS * 0}, ["x", "y"])["y"]
    wanted = [x * (x & 3) % 2**32 for x in WORDS.tolist()]
    wanted = [
        y ^ 0xFFFFFFFF if x >> 31 else y + 1 for x, y in zip(WORDS.tolist(), wanted, strict=True)
    ]
    assert found.tolist() == [wanted[lane ^ 1] for lane in range(32)]


def test_named_barriers_and_arrivals() -> None:
    """The first warp hands numbers to the second; the others wait for neither."""
    body = """ld.param.b64 %rd1, [p0];
mov.u32 %r1, %tid.x;
and.b32 %r9, %r1, 31;
shl.b32 %r2, %r9, 2;
cvt.u64.u32 %rd2, %r2;
add.s64 %rd1, %rd1, %rd2;
setp.gt.u32 %p1, %r1, 63;
@%p1 bra $L_end;
setp.gt.u32 %p1, %r1, 31;
@%p1 bra $L_second;
add.s32 %r3, %r9, 100;
st.shared.b32 [%r2], %r3;
bar.arrive 1, 64;
bra.uni $L_end;
$L_second:
bar.sync 1, 64;
xor.b32 %r2, %r2, 124;
ld.shared.b32 %r4, [%r2];
mov.u32 %r5, %ctaid.x;
mul.wide.u32 %rd2, %r5, 128;
add.s64 %rd1, %rd1, %rd2;
st.global.b32 [%rd1], %r4;
$L_end:
bar.sync 0;"""
    arrays = {"x": np.zeros(64, np.int32)}
    found = run(written(body, parameters=1, threads=128), arrays, ["x"], (2,))["x"]
    assert found.tolist() == 2 * list(range(131, 99, -1))


def test_a_producer_that_consumers_spin_for() -> None:
    """Consumers come first in the program and wait; the producer arrives at their mbarrier."""
    body = """ld.param.b64 %rd1, [p0];
mov.u32 %r1, %tid.x;
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [1024], 32;
bar.sync 0;
setp.gt.u32 %p1, %r1, 31;
@%p1 bra $L_producer;
$L_wait:
mbarrier.try_wait.parity.shared.b64 %p2, [1024], 0;
@!%p2 bra $L_wait;
shl.b32 %r2, %r1, 2;
ld.shared.b32 %r4, [%r2];
cvt.u64.u32 %rd2, %r2;
add.s64 %rd1, %rd1, %rd2;
mov.u32 %r5, %ctaid.x;
mul.wide.u32 %rd2, %r5, 128;
add.s64 %rd1, %rd1, %rd2;
st.global.b32 [%rd1], %r4;
bra.uni $L_end;
$L_producer:
sub.s32 %r2, %r1, 32;
shl.b32 %r2, %r2, 2;
st.shared.b32 [%r2], %r1;
atom.shared.add.u32 %r7, [2048], 1;
mbarrier.arrive.shared::cta.b64 _, [1024], 1;
atom.shared.add.u32 %r7, [2048], 1;
$L_end:
bar.sync 0;"""
    arrays = {"x": np.zeros(64, np.int32)}
    compiled = written(body, parameters=1, threads=64, target="sm_90")
    assert run(compiled, arrays, ["x"], (2,))["x"].tolist() == 2 * list(range(32, 64))
    few = written(
        body.replace("[1024], 32", "[1024], 33"), parameters=1, threads=64, target="sm_90"
    )
    with pytest.raises(
        Exception, match=r"body:9: .*mbarrier at 1024 .* lacks 1 arrivals and 0 bytes"
    ):
        run(few, arrays, ["x"])
    early = written(
        body.replace("@!%p2 bra $L_wait;", ""), parameters=1, threads=64, target="sm_90"
    )
    with pytest.raises(
        Exception, match=r"race: the write by warp 1 .* the read by warp 0 at body:11"
    ):
        run(early, arrays, ["x"])


def test_matrices_go_through_shared_memory_and_back() -> None:
    body = """ld.param.b64 %rd1, [p0];
ld.param.b64 %rd2, [p1];
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 4;
cvt.u64.u32 %rd3, %r2;
add.s64 %rd1, %rd1, %rd3;
add.s64 %rd2, %rd2, %rd3;
ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1];
st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};
ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r3, %r4, %r5, %r6}, [%r2];
movmatrix.sync.aligned.m8n8.trans.b16 %r3, %r3;
stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {%r3, %r4, %r5, %r6};
ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];
st.global.v4.b32 [%rd2], {%r3, %r4, %r5, %r6};"""
    x = np.arange(4 * 64, dtype=np.int16).reshape(4, 8, 8)
    found = run(written(body, target="sm_90"), {"x": x, "y": x * 0}, ["x", "y"])["y"]
    assert (found[0] == x[0]).all()
    assert (found[1:] == x[1:].transpose(0, 2, 1)).all()


def test_parameters_are_read_by_their_sizes_and_places() -> None:
    source = written("").source
    declared = "\t.param .u64 p0,\n\t.param .u64 p1"
    assert declared in source
    source = source.replace(
        declared, "\t.param .u32 p0,\n\t.param .f32 p1,\n\t.param .u16 p2,\n\t.param .u64 p3"
    )
    body = """ld.param.b64 %rd1, [p3];
ld.param.s32 %rd2, [p0];
st.global.b64 [%rd1], %rd2;
ld.param.b32 %r1, [p1];
st.global.b32 [%rd1+8], %r1;
ld.param.u16 %r2, [p2];
st.global.b32 [%rd1+12], %r2;"""
    compiled = written(body)
    whole = type(compiled)(source.replace("\n\tret;", f"\n{body}\n\tret;"), "kernel", 32, 0)
    driver = device(80)
    function = driver.load(b"", whole.source, "kernel", 32, 0)
    address = driver.allocate(16, "x")
    driver.launch(function, (1,), struct.pack("<ifH6xq", -5, 2.5, 65535, address))
    driver.synchronize()
    assert struct.unpack("<qfI", driver.contents(address, 16).tobytes()) == (-5, 2.5, 65535)


def test_integers_that_are_added_to_a_few_places() -> None:
    """A histogram of 64 bits: threads with one place see each other's sums, which wrap."""
    body = """ld.param.b64 %rd1, [p0];
mov.u32 %r1, %tid.x;
and.b32 %r2, %r1, 3;
mad.wide.u32 %rd2, %r2, 8, %rd1;
cvt.u64.u32 %rd3, %r1;
atom.global.gpu.relaxed.add.u64 %rd4, [%rd2], %rd3;
mad.wide.u32 %rd5, %r1, 8, %rd1;
st.global.b64 [%rd5+32], %rd4;"""
    x = np.zeros(36, np.uint64)
    x[1] = 2**64 - 1
    found = run(written(body, parameters=1), {"x": x}, ["x"])["x"].view(np.uint64)
    threads, before = np.arange(32, dtype=np.uint64), x.copy()
    for thread in range(32):
        assert found[4 + thread] == before[thread % 4]
        before[thread % 4 :: 36] += threads[thread]
    assert found[:4].tolist() == before[:4].tolist()


def test_atomic_operations_of_threads_one_after_the_other() -> None:
    body = """ld.param.b64 %rd1, [p0];
mov.u32 %r1, %tid.x;
atom.global.add.u32 %r2, [%rd1], 2;
atom.shared.add.u32 %r3, [64], %r1;
red.global.max.s32 [%rd1+4], %r1;
atom.global.inc.u32 %r4, [%rd1+8], 9;
atom.global.add.f32 %r5, [%rd1+12], 0f3F800000;
bar.sync 0;
setp.eq.u32 %p1, %r1, 3;
ld.shared.b32 %r6, [64];
@%p1 st.global.b32 [%rd1+16], %r2;"""
    x = np.zeros(5, np.int32)
    found = run(written(body, parameters=1), {"x": x}, ["x"])["x"]
    assert found[:3].tolist() == [64, 31, 2]
    assert found[3:4].view(np.float32)[0] == 32.0
    assert found[4] == 6
