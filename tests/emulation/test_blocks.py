"""Races between the blocks of a launch are noticed, with both lines; what is ordered is not."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import pytest

from infc.ir.errors import DeviceError

from .conftest import Compile
from .running import run, written

NUMBERS = """ld.param.b64 %rd1, [p0];
mov.u32 %r1, %ctaid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
xor.b32 %r2, %r1, 1;
mul.wide.u32 %rd4, %r2, 4;
add.s64 %rd5, %rd1, %rd4;
"""


def blocks(statements: str, count: int = 2, threads: int = 32) -> Sequence[int]:
    """What so many blocks leave in x: each has its number at %r1 and x[number] at %rd3, and the
    other of a pair at %rd5."""
    kernel = written(NUMBERS + statements, parameters=1, threads=threads)
    found: Sequence[int] = run(kernel, {"x": np.full(8, 7, np.int32)}, ["x"], (count,))[
        "x"
    ].tolist()
    return found


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (
            "st.global.b32 [%rd1], %r1;",
            r"body:7: .*the write of byte 0 of 'x' .*write .* at body:7",
        ),
        (
            "st.global.b32 [%rd3], %r1;\nld.global.b32 %r4, [%rd5];",
            r"body:8: .*the read of byte . of 'x' .* by block . .* the write by block . at body:7",
        ),
        (
            "ld.global.b32 %r4, [%rd5];\nst.global.b32 [%rd3], %r1;",
            r"body:8: .*the write of byte . of 'x' .* the read by block . at body:7",
        ),
        (
            "ld.global.b32 %r4, [%rd1];\nadd.s64 %rd6, %rd3, 4;\nst.global.b32 [%rd6], %r1;\n"
            "setp.eq.u32 %p1, %r1, 1;\n@%p1 st.global.b32 [%rd1], %r1;",
            r"body:11: .*the write of byte 0 of 'x' .*the read by several blocks at body:7",
        ),
        (
            "ld.global.v2.b32 {%r4, %r5}, [%rd1];\nsetp.eq.u32 %p1, %r1, 0;\n"
            "@%p1 bra $L1;\nst.global.b32 [%rd1+4], %r1;\n$L1:",
            r"body:10: .*the write of byte 4 of 'x' .*the read by several blocks at body:7",
        ),
    ],
)
def test_races_between_blocks(statements: str, message: str) -> None:
    with pytest.raises(DeviceError, match=f"(?s){message}"):
        blocks(statements)


def test_blocks_that_run_one_after_the_other_race_too() -> None:
    # 1024 threads each: no more than sixteen run in lockstep.
    statements = "st.global.b32 [%rd1], %r1;"
    with pytest.raises(DeviceError, match=r"by block \d+ is not ordered after the write by block"):
        blocks("setp.eq.u32 %p1, %r1, 0;\nsetp.eq.u32 %p2, %r1, 20;\nor.pred %p1, %p1, %p2;\n@%p1 "
               + statements, 24, 1024)  # fmt: skip


def test_what_is_no_race() -> None:
    assert blocks("st.global.b32 [%rd3], %r1;\nld.global.b32 %r4, [%rd3];")[:2] == [0, 1]
    assert blocks("mov.u32 %r4, 3;\nred.global.add.u32 [%rd1], %r4;")[0] == 7 + 2 * 32 * 3
    kernel = "ld.param.b64 %rd6, [p1];\nld.global.b32 %r4, [%rd6];\nst.global.b32 [%rd3], %r4;"
    both = {"x": np.zeros(8, np.int32), "y": np.full(8, 5, np.int32)}
    found = run(written(NUMBERS + kernel), both, ["x", "y"], (4,))
    assert found["x"].tolist() == [5, 5, 5, 5, 0, 0, 0, 0]


LAST = """st.global.b32 [%rd3], %r1;
bar.sync 0;
mov.u32 %r9, %tid.x;
setp.eq.u32 %p2, %r9, 0;
mov.u32 %r4, 1;
@%p2 atom.global.gpu.acq_rel.add.u32 %r5, [%rd1+16], %r4;
@%p2 st.shared.b32 [0], %r5;
bar.sync 0;
ld.shared.b32 %r5, [0];
setp.ne.u32 %p1, %r5, 8;
@%p1 ret;
ld.global.v2.b32 {%r6, %r7}, [%rd1];
st.global.b32 [%rd1+20], %r7;
st.global.b32 [%rd1+16], %r4;"""
"""The last of two blocks to count reads what both stored; the counter begins at 7."""


@pytest.mark.parametrize("threads", [32, 64])
def test_the_last_block_to_count_sees_the_others(threads: int) -> None:
    assert blocks(LAST, threads=threads)[:6] == [0, 1, 7, 7, 1, 1]


@pytest.mark.parametrize(
    ("text", "other"),
    [("acq_rel", "relaxed"), ("acq_rel", "acquire"), ("acq_rel", "release"), ("bar.sync 0;\n", "")],
)
def test_a_counter_that_orders_too_little(text: str, other: str) -> None:
    with pytest.raises(DeviceError, match=r"body:\d+: ld\.global.*the read of .*write by block"):
        blocks(LAST.replace(text, other, 1), threads=64)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels")
def test_tiles_of_triton_that_overlap(compile_triton: Compile) -> None:
    compiled = compile_triton(
        "dependent_copy", 90, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"B": 128}
    )
    arrays = {"x": np.arange(256, dtype=np.float32), "y": np.zeros(256, np.float32)}
    run(compiled, arrays, ["x", "y", 256], (2,), extra_pointers=2)
    wrong = compiled.source.replace("%ctaid.x", "0")
    assert wrong != compiled.source
    changed = type(compiled)(wrong, compiled.entry, compiled.threads, compiled.shared_bytes)
    with pytest.raises(DeviceError, match=r"kernels\.py:\d+:\d+.*race: the write of byte 0 of 'y'"):
        run(changed, arrays, ["x", "y", 256], (2,), extra_pointers=2)
