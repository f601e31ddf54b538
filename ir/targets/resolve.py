"""Targets by name, over all families, and whether this machine is one."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..errors import TargetError
from ..nearest import did_you_mean
from .arm import ARM
from .base import Family
from .cuda import CUDA
from .x86 import X86

FAMILIES: Final[tuple[Family, ...]] = (X86, ARM, CUDA)
"""Every family, in the order in which targets and features are listed."""

_FEATURES: Final = {name: family for family in FAMILIES for name in family.features}
_TARGETS: Final = {
    name: features for family in FAMILIES for name, features in family.targets.items()
}


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to compile for: how it was named (never `native`) and all that it has."""

    name: str
    features: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    def has(self, feature: str) -> bool:
        """Whether code for this target may use the feature."""
        return feature in self.features

    @property
    def family(self) -> Family:
        """The kind of machine."""
        return _FEATURES[self.features[0]]


def resolve_target(text: str) -> Target:
    """The target that `text` names: `x86-64-v3`, `x86-64-v4+vnni+bf16`, `zen4`, `native`.

    `native` becomes the best target that this machine is of, and the extras it has that kernels
    use. Raises TargetError for a name that is unknown, or a machine that is of no target.
    """
    base, *extras = (part.strip() for part in text.strip().lower().split("+"))
    if base == "native":
        base, *native = _native_parts()
        extras = [*native, *extras]
    if base not in _TARGETS:
        raise _unknown("target", base, [*_TARGETS, "native"])
    for extra in extras:
        if extra not in _FEATURES:
            raise _unknown("target feature", extra, _FEATURES)
    chosen = {*_TARGETS[base], *extras}
    families = {_FEATURES[name] for name in chosen}
    if len(families) > 1:
        raise TargetError(f"target {text!r} combines features that no machine has")
    families.pop().check(base, chosen, text)
    added = [extra for extra in _FEATURES if extra in extras and extra not in _TARGETS[base]]
    return Target("+".join([base, *added]), tuple(name for name in _FEATURES if name in chosen))


def host_features() -> frozenset[str]:
    """The features that this machine has.

    Raises TargetError on a platform that infc does not run on.
    """
    return _host_family().detect()


def device_of(features: Iterable[str]) -> str:
    """What runs code that may use these: "cpu", also where there are none, or "gpu"."""
    families = {_FEATURES[name] for name in features if name in _FEATURES}
    return next((family.device for family in families), "cpu")


def check_platform() -> None:
    """Raises TargetError unless this is Linux on x86-64."""
    _host_family()


def check_target(features: Iterable[str], *, where: str | None = None) -> None:
    """Raises TargetError naming what this machine lacks of `features`, and what to do.

    Those of a GPU are not looked for: whoever runs the artifact asks the driver of the GPU.
    """
    wanted = list(features)
    for name in wanted:
        if name not in _FEATURES:
            raise _unknown("target feature", name, _FEATURES)
    family = _host_family()
    if wanted and all(_FEATURES[name].device != family.device for name in wanted):
        return
    here = family.detect()
    if strange := [name for name in wanted if _FEATURES[name] is not family]:
        built = _FEATURES[strange[0]].name
        raise TargetError(
            f"the artifact was built for {built}, but this is {family.name}", where=where
        )
    missing = [name for name in family.features if name in wanted and name not in here]
    if missing:
        raise TargetError(
            f"this machine lacks {', '.join(missing)}, which the artifact requires",
            where=where,
            hint=f"`infc rebuild {where or 'ARTIFACT'}` builds it for {_native_or('this machine')}",
        )


def _host_family() -> Family:
    machine = platform.machine().lower()
    if sys.platform.startswith("linux"):
        for family in FAMILIES:
            if machine in family.platforms:
                return family
    raise TargetError(
        f"infc runs on Linux on x86-64, but this is {platform.system()} on {platform.machine()}",
        hint="use such a machine, or a container on one",
    )


def _native_or(otherwise: str) -> str:
    try:
        return "+".join(_native_parts())
    except TargetError:
        return otherwise


def _native_parts() -> list[str]:
    family = _host_family()
    return family.native(family.detect())


def _unknown(kind: str, name: str, known: Iterable[str]) -> TargetError:
    names = list(known)
    return TargetError(
        f"unknown {kind} {name!r}", hint=did_you_mean(name, names, f"known: {', '.join(names)}")
    )
