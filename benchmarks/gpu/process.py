"""Single launches on a device, as tests have them carried out by Triton's interpreter."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from infc.codegen.triton.aot import KernelBuild
from infc.codegen.triton.calls import KernelCode, Tuning
from infc.ir.targets import Target
from infc.runtime.executors.gpu.driver import Driver, Function
from tests.codegen.triton.interpreting import MARGIN_BYTES, Bytes, Call, Place

_MARGIN: Final = 0xA5
_FORMATS: Final = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}


class OnDevice:
    """Carries out calls: each array has a margin on both sides, which nothing may change."""

    def __init__(self, driver: Driver, target: Target, folder: Path) -> None:
        self._driver, self._target, self._folder = driver, target, folder
        self._functions: dict[str, Function] = {}

    def run(self, calls: Sequence[Call], arrays: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """The arrays after the calls; AssertionError where a margin was written to."""
        self._compile([code_of(call.code) for call in calls])
        driver, places = self._driver, {}
        sizes = {name: len(data) + 2 * MARGIN_BYTES for name, data in arrays.items()}
        for name, data in arrays.items():
            places[name] = driver.allocate(sizes[name], name)
            wide = driver.host_array(sizes[name])
            wide[:] = _MARGIN
            wide[MARGIN_BYTES : MARGIN_BYTES + len(data)] = data
            driver.upload(places[name], wide)
        for call in calls:
            if 0 not in call.grid:
                code = code_of(call.code)
                function, packed = self._functions[code.key], self._packed(code, call, places)
                driver.launch(function, (*call.grid, 1, 1)[:3], packed)
        results = {}
        for name, data in arrays.items():
            wide = driver.host_array(sizes[name])
            driver.download(wide, places[name])
            driver.synchronize()
            first, last = MARGIN_BYTES, MARGIN_BYTES + len(data)
            margins = np.concatenate([wide[:first], wide[last:]])
            assert (margins == _MARGIN).all(), f"a margin of {name} was written to"
            results[name] = wide[first:last].copy()
        for address in places.values():
            driver.free(address)
        return results

    def _compile(self, codes: Sequence[KernelCode]) -> None:
        missing = {code.key: code for code in codes if code.key not in self._functions}
        if not missing:
            return
        # Paths of images and sources are relative to an artifact, of which this is the folder.
        folder = self._folder / "code/kernels"
        folder.mkdir(parents=True, exist_ok=True)
        build = KernelBuild(missing, self._target, folder)
        build.start()
        for key, kernel in build.wait().items():
            image = (self._folder / kernel.image).read_bytes()
            source = (self._folder / kernel.source).read_text(encoding="utf-8")
            self._functions[key] = self._driver.load(
                image, source, kernel.entry, kernel.threads, kernel.shared_bytes
            )

    def _packed(self, code: KernelCode, call: Call, places: Mapping[str, int]) -> bytes:
        packed = b""
        for (_, kind), argument in zip(code.parameters, call.arguments, strict=True):
            form, value = _FORMATS.get(kind, "Q"), argument
            if isinstance(argument, Place):
                form, value = "Q", places[argument.array] + MARGIN_BYTES + argument.offset
            packed += bytes(-len(packed) % struct.calcsize(form)) + struct.pack(f"<{form}", value)
        return packed + bytes(-len(packed) % 8) + bytes(16)  # two pointers of Triton's own


def code_of(plain: Mapping[str, Any]) -> KernelCode:
    """The code that `KernelCode.plain` gave."""
    return KernelCode(
        module=plain["module"],
        function=plain["function"],
        parameters=tuple((name, kind) for name, kind in plain["parameters"]),
        aligned=frozenset(plain["aligned"]),
        constants=tuple(plain["constants"].items()),
        tuning=Tuning(plain["warps"], plain["stages"]),
        source=plain["source"],
        dependent=plain["dependent"],
    )
