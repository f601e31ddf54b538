"""The flags that let a C++ compiler use the features of a target."""

from __future__ import annotations

from typing import Final

from ...ir.targets import ARM, Target

_X86: Final = {
    "vnni": "avx512vnni",
    "bf16": "avx512bf16",
    "vbmi": "avx512vbmi",
    "vbmi2": "avx512vbmi2",
    "ifma": "avx512ifma",
    "bitalg": "avx512bitalg",
    "vpopcntdq": "avx512vpopcntdq",
    "fp16": "avx512fp16",
}
"""What gcc and clang call a feature, where they have another name for it."""

_ARM: Final = {"neon": "simd"}


def compiler_flags(target: Target) -> tuple[str, ...]:
    """The flags that let gcc or clang use these features and no other, on any machine."""
    if target.family is ARM:
        names = (_ARM.get(name, name) for name in target.features)
        return ("+".join(["-march=armv8-a", *names]),)
    return ("-march=x86-64", *(f"-m{_X86.get(name, name)}" for name in target.features))
