"""NVIDIA GPUs: one target for each compute capability, as machine code fits no other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Final

from ..errors import TargetError
from .base import Family

_CHIPS: Final = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")


class CudaFamily(Family):
    """NVIDIA GPUs by their compute capability: `sm_90` is 9.0.

    What a GPU can do follows from its capability, so that is the only feature of a target.
    """

    name: ClassVar[str] = "NVIDIA GPUs"
    device: ClassVar[str] = "gpu"
    features: ClassVar[tuple[str, ...]] = _CHIPS
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {name: (name,) for name in _CHIPS}

    def detect(self) -> frozenset[str]:
        """Not from here: a GPU is known to its driver, and no machine is of this family."""
        raise TargetError(
            "a GPU is found by its driver, not by its processor",
            hint="name the target, for example sm_90",
        )

    def native(self, here: Collection[str]) -> list[str]:
        """The target of a GPU of this capability, which its driver has told."""
        for name in here:
            if name in self.targets:
                return [name]
        raise TargetError(
            f"infc has no target for a GPU of {' '.join(sorted(here)) or 'unknown capability'}",
            hint=f"it has {', '.join(self.targets)}",
        )

    def check(self, base: str, features: Collection[str], text: str) -> None:
        """A GPU is of one capability."""
        if len(features) > 1:
            raise TargetError(
                f"target {text!r} names several GPUs, and machine code fits only one",
                hint=f"use {base} alone",
            )

    def capability(self, target: str) -> int:
        """The compute capability of a target as one number: 90 for sm_90."""
        return int(target.removeprefix("sm_"))


CUDA: Final = CudaFamily()
