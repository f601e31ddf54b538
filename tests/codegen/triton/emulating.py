"""Launches by the emulation of PTX: the compiled kernels, carried out without a GPU."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from infc.codegen.triton.aot import KernelBuild
from infc.codegen.triton.calls import TYPES, KernelCode
from infc.ir.launches import Kernel
from infc.ir.targets import CUDA, Target
from infc.runtime.executors.gpu.driver import MatrixMap

from ...emulation.driver import DEVICE, EmulatedDriver
from .interpreting import Bytes, Call, Matrix, Place
from .running import TARGET

_FORMATS = {"i32": "<i", "fp32": "<f"}
_SCRATCH_POINTERS = bytes(16)
"""Two that Triton appends."""


class Emulating:
    """Compiled kernels, in the place of a process of the interpreter.

    `change` makes another text of the PTX of a kernel, by its entry.
    """

    def __init__(
        self, target: Target = TARGET, change: Callable[[str, str], str] | None = None
    ) -> None:
        self._target = target
        self._device = replace(DEVICE, capability=divmod(CUDA.capability(target.name), 10))
        self._change = change
        self._kernels: dict[str, tuple[Kernel, bytes, str]] = {}

    def compile(self, codes: Mapping[str, KernelCode], place: Path) -> None:
        """Compile what later calls launch."""
        build = KernelBuild(codes, self._target, place / "kernels")
        build.start()
        for key, kernel in build.wait().items():
            image, source = (
                place / one.removeprefix("code/") for one in (kernel.image, kernel.source)
            )
            text = source.read_text(encoding="utf-8")
            if self._change is not None:
                text = self._change(kernel.entry, text)
            self._kernels[_name(codes[key].plain())] = (kernel, image.read_bytes(), text)

    def run(self, calls: Sequence[Call], arrays: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """The arrays after the calls."""
        driver = EmulatedDriver(self._device)
        places: dict[str, int] = {}
        for name, data in arrays.items():
            places[name] = driver.allocate(max(1, len(data)), name)
            if len(data):
                driver.upload(places[name], data.copy())
        for call in calls:
            if 0 not in call.grid:
                kernel, image, source = self._kernels[_name(call.code)]
                function = driver.load(
                    image, source, kernel.entry, kernel.threads, kernel.shared_bytes
                )
                packed = _parameters(call, places, driver)
                driver.launch(function, call.grid, packed, dependent=call.dependent)
        results = {name: np.empty(len(data), np.uint8) for name, data in arrays.items()}
        for name, target in results.items():
            if len(target):
                driver.download(target, places[name])
        driver.synchronize()
        driver.close()
        return results


def _name(code: Mapping[str, object]) -> str:
    return json.dumps(dict(code), sort_keys=True)


def _parameters(call: Call, places: Mapping[str, int], driver: EmulatedDriver) -> bytes:
    """Arguments one after the other, each aligned to its size."""
    buffer = b""
    for (_, kind), value in zip(call.code["parameters"], call.arguments, strict=True):
        if isinstance(value, Place):
            data = struct.pack("<Q", places[value.array] + value.offset)
        elif isinstance(value, Matrix):
            buffer += bytes(-len(buffer) % 64) + _descriptor(value, places, driver)
            buffer += struct.pack("<iiqq", *value.shape, value.shape[1], 1)
            continue
        else:
            data = struct.pack(_FORMATS[kind], value)
        buffer += bytes(-len(buffer) % len(data)) + data
    return buffer + bytes(-len(buffer) % 8) + _SCRATCH_POINTERS


def _descriptor(value: Matrix, places: Mapping[str, int], driver: EmulatedDriver) -> bytes:
    kind = {name: dtype.value for dtype, name in TYPES.items()}[value.place.type]
    address = places[value.place.array] + value.place.offset
    return driver.descriptor(MatrixMap(address, kind, value.shape, value.box, value.swizzle_bytes))
