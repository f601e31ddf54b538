"""The stages of a run, in their order, and the seconds that each may take on an H200."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from infc.ir.roofline import Ceilings

from .attention import measure_attention
from .checks import check_ops
from .idle import measure_idle
from .models import check_model
from .setting import Results, Setting
from .starting import measure_starting
from .steps import Workload, measure
from .tools import check_memory, profile_kernels
from .tuning import tune

MINUTES: Final = 8
"""What all stages must keep to."""

SMALL_STEPS: Final = ((2, 40),)
_FEW_OPS: Final = frozenset({"pointwise", "row_norm", "linear_bias", "gates"})


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. It is left out where fewer than `seconds` are left."""

    name: str
    seconds: float
    run: Callable[[Setting], Results]


def rates(ceilings: Results) -> Ceilings:
    """The ceilings; rates of other numbers follow from that of bfloat16, as in data sheets."""
    bf16 = ceilings["bf16"]
    return Ceilings(threads=0, read=ceilings["read"], fp32=bf16 / 12, bf16=bf16, int8=2 * bf16)


def plan(setting: Setting, ceilings: Ceilings) -> Iterator[Stage]:
    """All stages but the ceilings, which come first."""
    small = setting.emulated is not None
    yield Stage("ops", 60, partial(check_ops, names=_FEW_OPS if small else None))
    yield Stage("model", 45, check_model)
    workloads = dict(_workloads(small))
    seconds = {"1b-none": 30, "8b-none": 50, "8b-int4": 45, "8b-fp8": 35, "1b-int4": 20}
    for name, one in workloads.items():
        run = partial(measure, workload=one, ceilings=ceilings)
        yield Stage(name, seconds.get(name, 30), run)
    main = workloads["tiny-none" if small else "8b-none"]
    coded = workloads["tiny-int4" if small else "8b-int4"]
    yield Stage("idle", 15, partial(measure_idle, workload=main))
    yield Stage("attention", 15, partial(measure_attention, ceilings=ceilings))
    yield Stage("ready", 25, partial(measure_starting, workloads=(main, coded)))
    yield Stage("sanitizer", 40, _check_memory)
    yield Stage("ncu", 30, partial(_profile_kernels, workload=main))
    yield Stage("tuning", 30, tune)


def _workloads(small: bool) -> Iterator[tuple[str, Workload]]:
    """What is measured of each shape; that of a batch-invariant artifact follows its plain one."""
    if small:
        yield "tiny-none", Workload("tiny", "none", SMALL_STEPS, (48,))
        yield "tiny-none-invariant", Workload("tiny", "none", SMALL_STEPS, (48,), True, False)
        yield "tiny-int4", Workload("tiny", "int4", SMALL_STEPS, (48,))
        return
    yield "1b-none", Workload("1b", "none")
    yield "8b-none", Workload("8b", "none")
    yield "8b-int4", Workload("8b", "int4")
    yield "8b-none-invariant", Workload("8b", "none", ((1, 512), (32, 2048)), (2048,), True, False)
    yield "8b-fp8", Workload("8b", "fp8")
    yield "1b-int4", Workload("1b", "int4")


def _check_memory(setting: Setting) -> Results:
    folder = setting.folder
    return check_memory(
        setting, {kind: folder / f"model-{kind}/triton" for kind in ("float32", "bfloat16")}
    )


def _profile_kernels(setting: Setting, workload: Workload) -> Results:
    timed = setting.kept(f"{workload.shape}-{workload.scheme}") or {}
    return profile_kernels(setting, workload, timed.get("launches of a decode step", {}))
