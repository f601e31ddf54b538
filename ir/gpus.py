"""GPUs of each target, for plans and predictions where none is at hand: memory and ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .roofline import Ceilings

LAUNCH_SECONDS: Final = 1.3e-6
"""From the end of one kernel of a CUDA graph to the begin of the next, as published for an H100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that many have of a target. `source` says where its ceilings are from."""

    name: str
    memory_bytes: int
    ceilings: Ceilings
    source: str


def _sheet(name: str, gigabytes: float, read: float, fp32: float, bf16: float, int8: float) -> Gpu:
    """Of a data sheet: terabytes and tera-operations a second, of dense matrices."""
    rates = [1e12 * rate for rate in (read, fp32, bf16, int8)]
    return Gpu(
        name=name,
        memory_bytes=int(gigabytes * 1e9),
        ceilings=Ceilings(
            threads=0, **dict(zip(("read", "fp32", "bf16", "int8"), rates, strict=True))
        ),
        source="its data sheet",
    )


GPUS: Final[Mapping[str, Gpu]] = {
    "sm_80": _sheet("A100 80GB", 80, 2.04, 19.5, 312, 624),
    "sm_86": _sheet("A10", 24, 0.6, 31.2, 125, 250),
    "sm_89": _sheet("L40S", 48, 0.864, 91.6, 362, 733),
    "sm_90": Gpu(
        name="H200",
        memory_bytes=141 * 10**9,
        ceilings=Ceilings(threads=0, read=4.3e12, fp32=67e12, bf16=790e12, int8=1979e12),
        source="copies and products in bf16 as measured, the rest from its data sheet",
    ),
    "sm_100": _sheet("B200", 180, 7.7, 75, 2250, 4500),
}
"""By target; none for those of which no figures are known."""
