"""Builds the kernels for a target and element type, and calls them on numpy arrays."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import infc.codegen.cpp.toolchain as toolchain
from infc.codegen.cpp.layout import PanelLayout, panel_layout
from infc.ir.targets import ARM, Target, host_features, resolve_target
from infc.ir.types import DType

from . import emulation
from .remote import RemoteLibrary, skip_without_tools

Array = NDArray[Any]


def missing_features(target_name: str) -> set[str]:
    """What this machine lacks of a target; nothing for one that is emulated."""
    target = resolve_target(target_name)
    return set() if target.family is ARM else set(target.features) - host_features()


def unavailable(target_name: str) -> str:
    """Why a target's kernels do not run here; empty where they do."""
    if target_name == emulation.EMULATED:
        return emulation.unavailable()
    missing = missing_features(target_name)
    return f"this machine has no {', '.join(sorted(missing))}" if missing else ""


X86_TARGETS = ("x86-64-v4+vnni+bf16", "x86-64-v4", emulation.EMULATED, "x86-64-v3", "x86-64-v2")
TARGETS = ("aarch64",) if "INFC_TEST_ARM" in os.environ else X86_TARGETS
RUNNABLE = tuple(t for t in TARGETS if not unavailable(t))
"""Those whose code this machine runs, or emulates."""
DTYPES = ("float", "bf16")
KERNELS = Path(toolchain.__file__).parent / "kernels"
WRAPPER = Path(__file__).with_name("wrapper.cpp")
_WRAPPER_HEAD = Path(__file__).with_name("wrapper_head.hpp")
_DIRECTORY = tempfile.TemporaryDirectory(prefix="infc-kernels-")


class Library(Protocol):
    """Kernels that can be called: in this process, or in one that emulates another machine."""

    def call(self, name: str, *args: object) -> int: ...

    def address(self, array: Array) -> int: ...


class LocalLibrary:
    """Kernels for this machine."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def call(self, name: str, *args: object) -> int:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        return int(function(*(_argument(a) for a in args)))

    def address(self, array: Array) -> int:
        return array.ctypes.data


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels for one element type; arrays of bf16 are uint16 in numpy."""

    library: Library
    target: Target
    dtype: str

    def call(self, name: str, *args: object) -> int:
        """Calls an entry point: arrays become addresses, numbers int64 or double."""
        return self.library.call(name, *args)

    def address(self, array: Array) -> int:
        """Where the kernels find an array that other arguments point into."""
        return self.library.address(array)

    @contextmanager
    def team(self, threads: int, scratch: int = 0) -> Iterator[int]:
        """A thread team for the calls inside."""
        team = self.call("team_new", threads, scratch)
        try:
            yield team
        finally:
            self.call("team_free", team)

    def layout(self) -> PanelLayout:
        """How this target packs the weights."""
        return panel_layout(DType.F32 if self.dtype == "float" else DType.BF16, self.target)

    def array(self, values: Array) -> Array:
        """Values as the kernels' elements, rounded to nearest even."""
        narrow = np.ascontiguousarray(values, dtype=np.float32)
        return narrow.copy() if self.dtype == "float" else to_bf16(narrow)

    def values(self, elements: Array) -> Array:
        """Elements as float64."""
        wide = from_bf16(elements) if elements.dtype == np.uint16 else elements
        return wide.astype(np.float64)

    def poison(self, *shape: int) -> Array:
        """An array full of NaN: what a kernel must write, or must not read."""
        return self.array(np.full(shape, np.nan, dtype=np.float32))

    def pack(self, weight: Array) -> Array:
        """Elements [.., N, K] in panels."""
        signed = weight.view(np.int16) if weight.dtype == np.uint16 else weight
        packed: Array = self.layout().pack(torch.from_numpy(signed)).numpy()
        return packed.view(weight.dtype)

    @property
    def eps(self) -> float:
        """Relative error of one rounding to the element type."""
        return 2.0**-24 if self.dtype == "float" else 2.0**-8


def _argument(value: object) -> object:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, (int, np.integer)):
        return ctypes.c_int64(int(value))
    return value


def to_bf16(values: Array) -> Array:
    """float32 → bfloat16 bits, to nearest even, by torch."""
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits: Array) -> Array:
    """bfloat16 bits → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@cache
def kernels(target_name: str, dtype: str, wrapper: Path = WRAPPER) -> Kernels:
    """The kernels built for a target; skips the test where this machine can't run them."""
    emulated = target_name == emulation.EMULATED
    target = emulation.TARGET if emulated else resolve_target(target_name)
    if target.family is ARM:
        skip_without_tools()
    if reason := unavailable(target_name):
        pytest.skip(reason)
    directory = Path(_DIRECTORY.name) / f"{target_name}-{dtype}-{wrapper.stem}"
    shutil.copytree(KERNELS, directory / "kernels")
    head = emulation.head() if emulated else ""
    head += (
        f"#define ELEMENT infc_element\n#define WITH_{'MATH' if dtype == 'float' else 'OTHER'}\n"
    )
    head += '#include "kernels/bf16.hpp"\nusing infc_element = '
    head += "float;\n" if dtype == "float" else "infc::bf16;\n"
    source = directory / "wrapper.cpp"
    source.write_text(head + _WRAPPER_HEAD.read_text() + wrapper.read_text())
    library = directory / "kernels.so"
    (emulation.compile_library if emulated else toolchain.compile_library)(source, library, target)
    opened = RemoteLibrary(library) if target.family is ARM else LocalLibrary(library)
    return Kernels(opened, target, dtype)


def same_bits(left: Array, right: Array) -> bool:
    """Equality that tells -0 from 0 and one NaN from another."""
    return left.shape == right.shape and left.tobytes() == right.tobytes()
