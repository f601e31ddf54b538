"""Target machines as named sets of instruction-set features, and whether this machine has them."""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import TargetError
from .nearest import did_you_mean

_CPUINFO = Path("/proc/cpuinfo")


X86, ARM = "x86-64", "aarch64"


@dataclass(frozen=True, slots=True)
class Feature:
    """One instruction-set extension: its name here, to Linux and to the compiler."""

    name: str
    cpuinfo: str
    flag: str
    machine: str = X86


def _feature(name: str, cpuinfo: str | None = None, flag: str | None = None) -> Feature:
    return Feature(name, cpuinfo or name, f"-m{flag or name}")


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        _feature("cx16"),
        _feature("sahf", "lahf_lm"),
        _feature("popcnt"),
        _feature("sse3", "pni"),
        _feature("ssse3"),
        _feature("sse4.1", "sse4_1"),
        _feature("sse4.2", "sse4_2"),
        _feature("avx"),
        _feature("avx2"),
        _feature("bmi", "bmi1"),
        _feature("bmi2"),
        _feature("f16c"),
        _feature("fma"),
        _feature("lzcnt", "abm"),
        _feature("movbe"),
        _feature("avx512f"),
        _feature("avx512bw"),
        _feature("avx512cd"),
        _feature("avx512dq"),
        _feature("avx512vl"),
        _feature("vnni", "avx512_vnni", "avx512vnni"),
        _feature("bf16", "avx512_bf16", "avx512bf16"),
        _feature("avxvnni", "avx_vnni"),
        _feature("vbmi", "avx512vbmi", "avx512vbmi"),
        _feature("vbmi2", "avx512_vbmi2", "avx512vbmi2"),
        _feature("ifma", "avx512ifma", "avx512ifma"),
        _feature("bitalg", "avx512_bitalg", "avx512bitalg"),
        _feature("vpopcntdq", "avx512_vpopcntdq", "avx512vpopcntdq"),
        _feature("gfni"),
        _feature("fp16", "avx512_fp16", "avx512fp16"),
        _feature("amx-tile", "amx_tile"),
        _feature("amx-int8", "amx_int8"),
        _feature("amx-bf16", "amx_bf16"),
        Feature("neon", "asimd", "simd", ARM),
    )
}
"""Every feature that a target may name, in the order in which they are printed."""

_V2 = ("cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_ICE = (*_V4, "vnni", "vbmi", "vbmi2", "ifma", "bitalg", "vpopcntdq", "gfni")

TARGETS: dict[str, tuple[str, ...]] = {
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": _V4,
    "zen4": (*_ICE, "bf16"),
    "sapphirerapids": (*_ICE, "bf16", "avxvnni", "fp16", "amx-tile", "amx-int8", "amx-bf16"),
    "aarch64": ("neon",),
}
"""Named targets. `x86-64-v4` has neither VNNI nor BF16: `x86-64-v4+vnni+bf16` does.

For `aarch64` infc compiles, with a compiler that crosses over; it does not run there yet.
"""

# What `native` adds to the level of this machine: only what a kernel makes use of, so that two
# machines that differ in the rest get the same artifact.
_NATIVE_EXTRAS = ("vnni", "bf16")


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to compile for: how it was named (never `native`) and all that it has."""

    name: str
    features: tuple[str, ...]

    def has(self, feature: str) -> bool:
        """Whether code for this target may use the feature."""
        return feature in self.features

    @property
    def machine(self) -> str:
        """The kind of processor, `x86-64` or `aarch64`."""
        return FEATURES[self.features[0]].machine

    def compiler_flags(self) -> tuple[str, ...]:
        """The flags that let gcc or clang use these features and no other, on any machine."""
        if self.machine == ARM:
            return ("+".join(["-march=armv8-a", *(FEATURES[name].flag for name in self.features)]),)
        return ("-march=x86-64", *(FEATURES[name].flag for name in self.features))


def resolve_target(text: str) -> Target:
    """The target that `text` names: `x86-64-v3`, `x86-64-v4+vnni+bf16`, `zen4`, `native`.

    `native` becomes the highest level this machine has, and the extras it has that kernels use.
    Raises TargetError for a name that is unknown, or a machine that has no level at all.
    """
    base, *extras = (part.strip() for part in text.strip().lower().split("+"))
    if base == "native":
        base, *native = _native_parts()
        extras = [*native, *extras]
    if base not in TARGETS:
        raise _unknown("target", base, [*TARGETS, "native"])
    for extra in extras:
        if extra not in FEATURES:
            raise _unknown("target feature", extra, FEATURES)
    chosen = {*TARGETS[base], *extras}
    if len({FEATURES[name].machine for name in chosen}) > 1:
        raise TargetError(f"target {text!r} combines features that no processor has")
    if chosen & {"vnni", "bf16", "fp16"} and "avx512f" not in chosen:
        raise TargetError(
            f"target {text!r} names features that need AVX-512, and {base} has none",
            hint="add them to x86-64-v4, or leave them out",
        )
    added = [extra for extra in FEATURES if extra in extras and extra not in TARGETS[base]]
    return Target("+".join([base, *added]), tuple(name for name in FEATURES if name in chosen))


def host_features() -> frozenset[str]:
    """The features of FEATURES that this machine has.

    Raises TargetError on a platform that infc does not build for.
    """
    check_platform()
    return _read_features(_CPUINFO)


def check_platform() -> None:
    """Raises TargetError unless this is Linux on x86-64."""
    if not sys.platform.startswith("linux") or platform.machine().lower() not in _MACHINES:
        raise TargetError(
            f"infc runs on Linux on x86-64, but this is {platform.system()} on"
            f" {platform.machine()}",
            hint="use such a machine, or a container on one",
        )


_MACHINES = ("x86_64", "amd64")


def check_target(features: Iterable[str], *, where: str | None = None) -> None:
    """Raises TargetError naming what this machine lacks of `features`, and what to do."""
    unknown = [name for name in features if name not in FEATURES]
    if unknown:
        raise _unknown("target feature", unknown[0], FEATURES)
    here = host_features()
    if any(FEATURES[name].machine == ARM for name in features):
        raise TargetError(f"the artifact was built for {ARM}, but this is {X86}", where=where)
    missing = [name for name in FEATURES if name in set(features) and name not in here]
    if missing:
        raise TargetError(
            f"this machine lacks {', '.join(missing)}, which the artifact requires",
            where=where,
            hint=f"`infc rebuild {where or 'ARTIFACT'}` builds it for {_native_or('this machine')}",
        )


def _native_or(otherwise: str) -> str:
    try:
        return "+".join(_native_parts())
    except TargetError:
        return otherwise


def _native_parts() -> list[str]:
    here = host_features()
    levels = [name for name in ("x86-64-v4", "x86-64-v3", "x86-64-v2") if here >= {*TARGETS[name]}]
    if not levels:
        raise TargetError(
            "this machine does not support x86-64-v2",
            hint="infc requires a processor from 2009 or later",
        )
    extras = _NATIVE_EXTRAS if levels[0] == "x86-64-v4" else ()
    return [levels[0], *(name for name in extras if name in here)]


@functools.cache
def _read_features(cpuinfo: Path) -> frozenset[str]:
    try:
        text = cpuinfo.read_text()
    except OSError as error:
        raise TargetError(f"cannot detect the features of this machine: {error}") from None
    sets = [set(line.partition(":")[2].split()) for line in text.splitlines() if _is_flags(line)]
    # A thread may run on any processor: only what they all have counts.
    common = set.intersection(*sets) if sets else set()
    return frozenset(f.name for f in FEATURES.values() if f.cpuinfo in common)


def _is_flags(line: str) -> bool:
    return line.partition(":")[0].strip() == "flags"


def _unknown(kind: str, name: str, known: Iterable[str]) -> TargetError:
    names = list(known)
    hint = did_you_mean(name, names, f"known: {', '.join(names)}")
    return TargetError(f"unknown {kind} {name!r}", hint=hint)
