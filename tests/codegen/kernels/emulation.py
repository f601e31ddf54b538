"""The kernels' paths for AVX-512, VNNI and BF16 on machines that lack them, by SIMDe."""

import shutil
from pathlib import Path

import pytest

import infc.codegen.cpp.toolchain as toolchain
from infc.ir.targets import Target, host_features, resolve_target

from ... import sanitizers

EMULATED = "emulated"
TARGET = resolve_target("x86-64-v4+vnni+bf16")
"""What is emulated."""

# SIMDe's vdpbf16ps adds the lower product of a pair first; by Intel's manual a processor the
# upper one: the last bits of bf16 products may differ, within the bounds of the tests.
_HOST = resolve_target("x86-64-v3")
_SHIMS = Path(__file__).parent / "emulated"
_SIMDE = Path("/usr/include/simde/x86/avx512.h")
_FORCED = ("INFC_AVX512", "INFC_AVX2", "INFC_DPBF16", "INFC_VNNI")


def unavailable() -> str:
    """Why the emulation does not run here; empty where it does."""
    if sanitizers.ACTIVE:
        return "the sanitizers look at the kernels, and most of this is SIMDe"
    here = host_features()
    if here >= set(TARGET.features):
        return "nothing to emulate: this machine has AVX-512, VNNI and BF16"
    if lacking := set(_HOST.features) - here:
        return f"this machine has no {', '.join(sorted(lacking))}"
    return "" if _SIMDE.exists() else "no SIMDe here: apt-get install libsimde-dev"


def head() -> str:
    """What a source begins with."""
    # The stamp tells compilations that tests share apart by the version of SIMDe.
    stamp = f"#define SIMDE_STAMP {_SIMDE.stat().st_mtime_ns}\n"
    return stamp + "".join(f"#define {name} 1\n" for name in _FORCED)


def compile_library(source: Path, library: Path, _: Target) -> None:
    """As the toolchain's for this machine, with the shims found before the compiler's headers."""
    shutil.copytree(_SHIMS, source.parent, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        # A later level of optimisation wins: -O3 takes minutes on all that SIMDe is made of.
        patch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-O1"))
        toolchain.compile_library(source, library, _HOST)
