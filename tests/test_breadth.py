"""What is left to `--all`: many of a kind, and never all of it."""

from __future__ import annotations

from .breadth import SOME, between
from .codegen.kernels.emulation import EMULATED
from .codegen.kernels.harness import X86_TARGETS
from .configs import CONFIGS


def test_some_architectures_are_always_run() -> None:
    assert CONFIGS.keys() > SOME


def test_the_best_and_the_plainest_targets_are_always_run() -> None:
    best, *_, plainest = X86_TARGETS
    assert between(X86_TARGETS) == set(X86_TARGETS) - {best, plainest}
    assert between((EMULATED, "x86-64-v3", "x86-64-v2")) == {EMULATED}
    assert between(("aarch64",)) == between(()) == frozenset()
