"""Runs single kernels on an emulated device: hand-written ones, and those that Triton compiles."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infc.runtime.executors.gpu.driver import MatrixMap

from .driver import DEVICE, EmulatedDriver

Array = NDArray[Any]

SHARED_BYTES: Final = {80: 166912, 89: 101376, 90: 232448}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as the executor gets it."""

    source: str
    entry: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Box:
    """A descriptor of a named array, as an argument."""

    array: str
    box: tuple[int, int]
    dtype: str
    swizzle_bytes: int = 128


def device(capability: int = 90) -> EmulatedDriver:
    """An emulated device of a compute capability such as 90."""
    pair = divmod(capability, 10)
    return EmulatedDriver(replace(DEVICE, capability=pair, shared_bytes=SHARED_BYTES[capability]))


def _capability(compiled: Compiled) -> int:
    found = re.search(r"\.target sm_(\d+)", compiled.source)
    assert found is not None
    return int(found[1])


def written(
    body: str, *, parameters: int = 2, threads: int = 32, target: str = "sm_80"
) -> Compiled:
    """A kernel from the statements of its body, whose parameters p0, p1, ... are pointers."""
    declared = ",\n".join(f"\t.param .u64 p{place}" for place in range(parameters))
    numbered = "\n".join(
        f"\t.loc 1 {at} 0 // body:{at}\n\t{line}" for at, line in enumerate(body.splitlines())
    )
    source = f"""
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
{declared}
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<20>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<20>;
{numbered}
	ret;
}}
"""
    return Compiled(source, "kernel", threads, 4096)


def elementwise(statements: str, *, element_bytes: int = 4, threads: int = 32) -> Compiled:
    """A kernel in which each thread reads its number at p0 into %r1 (or %rs1, %rd1), runs the
    statements, and writes %r2 (%rs2, %rd2) to p1."""
    bits, name = 8 * element_bytes, {2: "rs", 4: "r", 8: "rd"}[element_bytes]
    return written(
        f"""ld.param.b64 %rd10, [p0];
ld.param.b64 %rd11, [p1];
mov.u32 %r30, %tid.x;
mul.wide.u32 %rd12, %r30, {element_bytes};
add.s64 %rd10, %rd10, %rd12;
add.s64 %rd11, %rd11, %rd12;
ld.global.b{bits} %{name}1, [%rd10];
{statements}
st.global.b{bits} [%rd11], %{name}2;""",
        threads=threads,
    )


def run(
    compiled: Compiled,
    arrays: Mapping[str, Array],
    arguments: Sequence[str | int | float | Box],
    grid: Sequence[int] = (1,),
    *,
    driver: EmulatedDriver | None = None,
    short: Mapping[str, int] | None = None,
    extra_pointers: int = 0,
) -> dict[str, Array]:
    """The arrays afterwards. `short` makes a buffer shorter than its array by so many bytes."""
    driver = driver or device(_capability(compiled))
    short = short or {}
    function = driver.load(
        b"", compiled.source, compiled.entry, compiled.threads, compiled.shared_bytes
    )
    addresses = {}
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        raw = raw[: raw.size - short.get(name, 0)]
        addresses[name] = driver.allocate(raw.size, name)
        driver.upload(addresses[name], raw)
    packed = bytearray()
    for argument in arguments:
        if isinstance(argument, Box):
            _append_box(packed, argument, arrays, addresses, driver)
        else:
            _append(
                packed, addresses.get(argument, argument) if isinstance(argument, str) else argument
            )
    for _ in range(extra_pointers):
        packed += bytes(-len(packed) % 8) + bytes(8)
    driver.launch(function, grid, bytes(packed))
    results = {}
    for name, array in arrays.items():
        result = np.ascontiguousarray(array).copy()
        raw = result.view(np.uint8).reshape(-1)
        driver.download(raw[: raw.size - short.get(name, 0)], addresses[name])
        results[name] = result
    driver.synchronize()
    return results


def _append(packed: bytearray, value: Any) -> None:
    if isinstance(value, float):
        data = struct.pack("<f", value)
    else:
        data = struct.pack("<q" if value >= 1 << 31 else "<i", value)
    packed += bytes(-len(packed) % len(data)) + data


def _append_box(
    packed: bytearray,
    argument: Box,
    arrays: Mapping[str, Array],
    addresses: Mapping[str, int],
    driver: EmulatedDriver,
) -> None:
    """What Triton takes for a descriptor of two dimensions: itself, the shape and the strides."""
    rows, columns = arrays[argument.array].shape
    matrix = MatrixMap(
        addresses[argument.array],
        argument.dtype,
        (rows, columns),
        argument.box,
        argument.swizzle_bytes,
    )
    packed += bytes(-len(packed) % 64) + driver.descriptor(matrix)
    packed += struct.pack("<iiqq", rows, columns, columns, 1)
