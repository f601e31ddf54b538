"""Target machines, one file a family: its features, their names, detection, and `native`."""

from .arm import ARM
from .base import Family
from .cuda import CUDA
from .resolve import (
    FAMILIES,
    Target,
    check_platform,
    check_target,
    device_of,
    host_features,
    resolve_target,
)
from .x86 import X86

__all__ = [
    "ARM",
    "CUDA",
    "FAMILIES",
    "X86",
    "Family",
    "Target",
    "check_platform",
    "check_target",
    "device_of",
    "host_features",
    "resolve_target",
]
