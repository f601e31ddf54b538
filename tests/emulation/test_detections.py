"""What a device would forgive or hide is noticed, with the line of the source."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infc.ir.errors import DeviceError

from . import launch
from .conftest import Compile
from .running import Box, Compiled, device, run, written
from .test_triton_kernels import as_float, compile_boxes, compile_product, poisoned, raw, run_boxes

Array = NDArray[Any]

M, N, K = 20, 128, 256


def products(compiled: Compiled, capability: int, **options: Any) -> tuple[Array, Array]:
    """What a product of bf16 matrices gave, and what it should."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator).bfloat16() for s in ((M, K), (N, K)))
    arrays = {"x": raw(x), "w": raw(w), "y": poisoned(M, N)}
    found = run(
        compiled,
        arrays,
        ["x", "w", "y", M, N, K],
        (2, N // 64),
        driver=device(capability),
        extra_pointers=2,
        **options,
    )["y"]
    return found, (x.float() @ w.float().T).numpy()


def changed(compiled: Compiled, pattern: str, replacement: str, count: int = 0) -> Compiled:
    """The kernel with a change to its PTX, which must be one."""
    source = re.sub(pattern, replacement, compiled.source, count=count)
    assert source != compiled.source
    return Compiled(source, compiled.entry, compiled.threads, compiled.shared_bytes)


def without(compiled: Compiled, pattern: str, place: int) -> Compiled:
    """The kernel without the instruction that is the place-th match."""
    found = list(re.finditer(pattern, compiled.source))[place]
    source = compiled.source[: found.start()] + "// " + compiled.source[found.start() :]
    return Compiled(source, compiled.entry, compiled.threads, compiled.shared_bytes)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [16, 64])
def test_barriers_of_a_pipelined_product(
    compile_triton: Compile, capability: int, rows: int
) -> None:
    compiled = compile_product(compile_triton, "bf16", capability, rows)
    found, wanted = products(compiled, capability)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    num_barriers = len(re.findall(r"bar\.sync", compiled.source))
    noticed = []
    for place in range(num_barriers):
        try:
            found, _ = products(without(compiled, r"bar\.sync", place), capability)
        except DeviceError as error:
            noticed.append(str(error))
        else:
            assert np.allclose(found, wanted, atol=1e-3), "a barrier was needed, and not missed"
    both_lines = r"kernels\.py:\d+:\d+.*race: the .* at kernels\.py:\d+:\d+"
    assert all(re.search(both_lines, one) for one in noticed)
    # Some barriers come twice, or before anything that they could order.
    assert len(noticed) >= 2


@pytest.mark.parametrize("capability", [80, 90])
def test_waits_for_too_few_copies(compile_triton: Compile, capability: int) -> None:
    compiled = compile_product(compile_triton, "bf16", capability, 64)
    weaker = changed(compiled, r"cp\.async\.wait_group\s+\w+", "cp.async.wait_group 8")
    with pytest.raises(DeviceError, match=r"kernels\.py:\d+:\d+.*race: the"):
        products(weaker, capability)


def test_a_wait_for_warpgroups_that_is_too_weak(compile_triton: Compile) -> None:
    compiled = compile_product(compile_triton, "bf16", 90, 64)
    weaker = changed(
        compiled, r"wgmma\.wait_group\.sync\.aligned\s+\w+", "wgmma.wait_group.sync.aligned 7"
    )
    with pytest.raises(DeviceError, match=r"kernels\.py:\d+:\d+.*(race|ends before)"):
        products(weaker, 90)


@pytest.mark.parametrize("capability", [80, 90])
def test_buffers_that_are_too_short(compile_triton: Compile, capability: int) -> None:
    compiled = compile_product(compile_triton, "bf16", capability, 16)
    with pytest.raises(
        DeviceError,
        match=r"kernels\.py:\d+:\d+: cp\.async.*out of bounds: 16 bytes .* past the end of 'x'",
    ):
        products(compiled, capability, short={"x": 16})
    with pytest.raises(DeviceError, match=r"st\.global.*out of bounds: .* past the end of 'y'"):
        products(compiled, capability, short={"y": 16})


_EXPECTED = r"(expect_tx\.shared\S* _, \[%r\d+\], )(\d+)"
BOX_FAULTS = {
    "more-bytes-expected": (_EXPECTED, r"\g<1>1\g<2>", "mbarrier.*lacks 0 arrivals and \\d+ bytes"),
    "fewer-bytes-expected": (_EXPECTED, r"\g<1>16", "mbarrier.*lacks 0 arrivals and -\\d+ bytes"),
    "no-bytes-expected": (_EXPECTED, r"\g<1>0", ""),
    "not-arrived": (r"mbarrier\.arrive\.expect_tx[^;]*;", "", "mbarrier.*lacks 1 arrivals"),
    "not-waited": (r"@!complete bra\.uni waitLoop;", ";", ""),
    "other-parity": (
        r"(mbarrier\.try_wait\.parity\S* complete, \[%r\d+\], )(%r\d+);",
        r"xor.b32 \2, \2, 1;\n\1\2;",
        "",
    ),
    "not-initialized": (r"(?s)@%p\d+ mbarrier\.init[^;]*;", "", "no mbarrier was initialised"),
    "not-committed": (r"cp\.async\.bulk\.commit_group;", "", "ends before"),
    "store-not-waited": (r"cp\.async\.bulk\.wait_group[^;]*;", "", "ends before"),
}
"""What is changed in a product of boxes, into what, and how that is told (anyhow where empty)."""


@pytest.fixture(scope="module")
def boxes() -> tuple[torch.Tensor, torch.Tensor, Array]:
    """Two matrices, and their product."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(s, generator=generator).bfloat16() for s in ((64, 128), (64, 128)))
    return x, w, (x.float() @ w.float().T).bfloat16().float().numpy()


@pytest.mark.parametrize("name", BOX_FAULTS)
def test_faults_of_boxes_are_noticed(
    name: str, compile_triton: Compile, boxes: tuple[torch.Tensor, torch.Tensor, Array]
) -> None:
    x, w, wanted = boxes
    compiled = compile_boxes(compile_triton)
    assert np.allclose(as_float(run_boxes(compiled, x, w)), wanted, rtol=2**-7, atol=1e-3)
    pattern, text, message = BOX_FAULTS[name]
    wrong = changed(compiled, pattern, text)
    with pytest.raises(DeviceError, match=rf"kernels\.py:\d+:\d+.*{message}"):
        run_boxes(wrong, x, w)


def test_descriptors_that_a_driver_refuses() -> None:
    arrays = {"x": np.zeros((8, 12), np.uint16)}
    kernel = written("ret;", parameters=1, target="sm_90a")
    for box in (Box("x", (8, 128), "bf16"), Box("x", (8, 8), "bf16"), Box("x", (300, 8), "bf16")):
        with pytest.raises(DeviceError, match="a descriptor with"):
            run(kernel, arrays, [box])


ADDRESSES = """ld.param.b64 %rd1, [p0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("ld.global.b32 %r2, [%rd3+2];", "misaligned: 4 bytes"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd3];", "misaligned: 16 bytes"),
        ("st.global.b64 [%rd3+4], %rd1;", "misaligned: 8 bytes"),
        ("ld.global.b32 %r2, [%rd3+4];", "out of bounds.*past the end of 'x'"),
        ("ld.global.b32 %r2, [%rd2];", "out of bounds.*in no allocation"),
        ("st.shared.b32 [%r1], %r1;", "misaligned: 4 bytes at 1 of shared"),
        ("st.shared.b32 [%r1+4094], %r1;", "out of bounds: 4 bytes at 4125 of shared"),
        ("trap;", "a trap"),
    ],
)
def test_accesses_that_a_device_refuses(statement: str, message: str) -> None:
    compiled = written(ADDRESSES + statement, parameters=1)
    with pytest.raises(DeviceError, match=f"body:4: .*{message}"):
        run(compiled, {"x": np.zeros(32, np.int32)}, ["x"])


EXCHANGE = """ld.param.b64 %rd1, [p0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
shl.b32 %r2, %r1, 2;
st.shared.b32 [%r2], %r1;
bar.sync 0;
xor.b32 %r3, %r2, 252;
ld.shared.b32 %r4, [%r3];
bar.sync 0;
st.shared.b32 [%r2], %r4;
mov.u32 %r5, %ctaid.x;
mul.wide.u32 %rd4, %r5, 256;
add.s64 %rd3, %rd3, %rd4;
st.global.b32 [%rd3], %r4;"""


def test_barriers_between_warps() -> None:
    arrays = {"x": np.zeros(192, np.int32)}
    found = run(written(EXCHANGE, parameters=1, threads=64), arrays, ["x"], (3,))["x"]
    assert found.tolist() == 3 * list(range(63, -1, -1))
    first, second = (
        EXCHANGE.replace("bar.sync 0;", "", 1),
        EXCHANGE[::-1].replace(";0 cnys.rab", "", 1)[::-1],
    )
    with pytest.raises(
        DeviceError, match=r"body:8: ld\.shared.*the read by warp . .*the write by warp . at body:5"
    ):
        run(written(first, parameters=1, threads=64), arrays, ["x"])
    with pytest.raises(
        DeviceError,
        match=r"body:10: st\.shared.*the write by warp . .*the read by warp . at body:8",
    ):
        run(written(second, parameters=1, threads=64), arrays, ["x"])
    # Within one warp nothing is missing: its threads read what they wrote together.
    alone = EXCHANGE.replace("bar.sync 0;", "").replace("252", "124")
    assert run(written(alone, parameters=1), {"x": np.zeros(32, np.int32)}, ["x"])["x"][0] == 31


def test_barriers_that_some_threads_do_not_reach() -> None:
    body = """mov.u32 %r1, %tid.x;
setp.lt.u32 %p1, %r1, 32;
@%p1 bra $L1;
bar.sync 0;
$L1:
"""
    body = body.replace("\n$L1:\n", "")
    compiled = written(body, threads=64)
    compiled = changed(compiled, r"\n\tret;", "\n$L1:\n\tret;")
    with pytest.raises(DeviceError, match=r"body:3: bar\.sync 0: only 32 of 64 threads"):
        run(compiled, {}, [0, 0], extra_pointers=1)


def test_memory_and_registers_begin_poisoned() -> None:
    body = ADDRESSES + "ld.shared.b32 %r9, [%r20];\nst.global.b32 [%rd3], %r9;"
    body = body.replace("%r20", "0")
    found = run(written(body, parameters=1), {"x": np.zeros(32, np.int32)}, ["x"])["x"]
    assert np.isnan(found.view(np.float32)).all()
    driver = device()
    address = driver.allocate(64, "fresh")
    assert np.isnan(driver.contents(address, 64).view(np.float32)).all()


def test_dependent_launches_wait_before_they_touch(compile_triton: Compile) -> None:
    compiled = compile_triton(
        "dependent_copy", 90, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"B": 128}, launch_pdl=True
    )
    for one, message in (
        (compiled, None),
        (without(compiled, r"griddepcontrol\.wait", 0), "'a' is read, which a launch before"),
    ):
        driver = device()
        function = driver.load(b"", one.source, one.entry, one.threads, one.shared_bytes)
        a, b = (driver.allocate(400, name) for name in "ab")
        driver.fill(a, 400, 0)
        for source, target, dependent in ((b, a, False), (a, b, True)):
            packed = np.array([source, target, 100, 0, 0], np.int64).tobytes()
            driver.launch(function, (1,), packed, dependent=dependent)
        if message is None:
            driver.synchronize()
        else:
            with pytest.raises(DeviceError, match=message):
                driver.synchronize()


def test_loops_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MAX_JUMPS", 1000)
    with pytest.raises(DeviceError, match=r"body:1: bra\.uni .*the kernel does not end"):
        run(changed(written("\nbra.uni $L1;"), r"(?s)// body:0", "\n$L1:"), {}, [0, 0, 0, 0])


def test_what_is_not_modelled_says_so() -> None:
    with pytest.raises(DeviceError, match=r"body:0: tcgen05\.alloc.*is not modelled"):
        run(written("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64;"), {}, [])
