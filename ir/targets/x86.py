"""x86-64: levels of the psABI, extensions by the names of Linux, and named processors."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar, Final

from ..errors import TargetError
from .base import Family

_CPUINFO = Path("/proc/cpuinfo")

_V2 = ("cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_ICE = (*_V4, "vnni", "vbmi", "vbmi2", "ifma", "bitalg", "vpopcntdq", "gfni")

_BY_LINUX: Final = {
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "vnni": "avx512_vnni",
    "bf16": "avx512_bf16",
    "avxvnni": "avx_vnni",
    "vbmi": "avx512vbmi",
    "vbmi2": "avx512_vbmi2",
    "ifma": "avx512ifma",
    "bitalg": "avx512_bitalg",
    "vpopcntdq": "avx512_vpopcntdq",
    "fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}
"""What `/proc/cpuinfo` calls a feature, where it has another name there."""

_NEED_AVX512: Final = ("vnni", "bf16", "fp16")
_NATIVE_EXTRAS: Final = ("vnni", "bf16")
"""What `native` adds to the level of a machine: only what a kernel makes use of, so that two
machines that differ in the rest get the same artifact."""


class X86Family(Family):
    """Processors of x86-64.

    `x86-64-v4` has neither VNNI nor BF16: `x86-64-v4+vnni+bf16` does.
    """

    name: ClassVar[str] = "x86-64"
    features: ClassVar[tuple[str, ...]] = (
        *_V4,
        "vnni",
        "bf16",
        "avxvnni",
        "vbmi",
        "vbmi2",
        "ifma",
        "bitalg",
        "vpopcntdq",
        "gfni",
        "fp16",
        "amx-tile",
        "amx-int8",
        "amx-bf16",
    )
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "x86-64-v2": _V2,
        "x86-64-v3": _V3,
        "x86-64-v4": _V4,
        "zen4": (*_ICE, "bf16"),
        "sapphirerapids": (*_ICE, "bf16", "avxvnni", "fp16", "amx-tile", "amx-int8", "amx-bf16"),
    }
    platforms: ClassVar[tuple[str, ...]] = ("x86_64", "amd64")

    def detect(self) -> frozenset[str]:
        """The features that all processors of this machine have."""
        return _read_features(_CPUINFO)

    def native(self, here: Collection[str]) -> list[str]:
        """The highest level of the machine, and the extras it has that kernels use."""
        levels = [name for name in ("x86-64-v4", "x86-64-v3", "x86-64-v2") if self._has(here, name)]
        if not levels:
            raise TargetError(
                "this machine does not support x86-64-v2",
                hint="infc requires a processor from 2009 or later",
            )
        extras = _NATIVE_EXTRAS if levels[0] == "x86-64-v4" else ()
        return [levels[0], *(name for name in extras if name in here)]

    def check(self, base: str, features: Collection[str], text: str) -> None:
        """Some extensions are of AVX-512."""
        if any(name in features for name in _NEED_AVX512) and "avx512f" not in features:
            raise TargetError(
                f"target {text!r} names features that need AVX-512, and {base} has none",
                hint="add them to x86-64-v4, or leave them out",
            )

    def _has(self, here: Collection[str], level: str) -> bool:
        return all(name in here for name in self.targets[level])


X86: Final = X86Family()


@functools.cache
def _read_features(cpuinfo: Path) -> frozenset[str]:
    try:
        text = cpuinfo.read_text()
    except OSError as error:
        raise TargetError(f"cannot detect the features of this machine: {error}") from None
    sets = [set(line.partition(":")[2].split()) for line in text.splitlines() if _is_flags(line)]
    # A thread may run on any processor: only what they all have counts.
    common = set.intersection(*sets) if sets else set()
    return frozenset(name for name in X86Family.features if _BY_LINUX.get(name, name) in common)


def _is_flags(line: str) -> bool:
    return line.partition(":")[0].strip() == "flags"
