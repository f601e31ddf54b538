"""aarch64: infc compiles for it, with a compiler that crosses over, and does not run there yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Final

from ..errors import TargetError
from .base import Family


class ArmFamily(Family):
    """Processors of 64-bit ARM."""

    name: ClassVar[str] = "aarch64"
    features: ClassVar[tuple[str, ...]] = ("neon",)
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {"aarch64": ("neon",)}

    def detect(self) -> frozenset[str]:
        """Not built: no machine of this family runs infc."""
        raise TargetError(f"infc does not run on {self.name}")

    def native(self, here: Collection[str]) -> list[str]:
        """All that there is."""
        return ["aarch64"]


ARM: Final = ArmFamily()
