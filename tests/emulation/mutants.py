"""Faults that are put into kernels, launches and steps, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from infc.ir.launches import Argument, Extent, Form, Integer, Launch, LaunchPlan, Pointer, Real
from infc.runtime.executors.gpu.driver import Device, Function

from .driver import EmulatedDriver
from .engines import ChangePlan
from .running import device


@dataclass(frozen=True, slots=True)
class PtxMutant:
    """Another text for what a pattern finds in the kernels of a name: the `place`-th, or all."""

    kernel: str
    pattern: str
    text: str
    place: int | None = None

    def change(self, entry: str, source: str) -> str:
        """The source with the fault; the same source where it has no place for it."""
        found = list(re.finditer(self.pattern, source))
        if entry != self.kernel or not found:
            return source
        chosen = found if self.place is None else found[self.place : self.place + 1]
        for one in reversed(chosen):
            source = source[: one.start()] + one.expand(self.text) + source[one.end() :]
        return source

    def driver(self, capability: int) -> MutantDriver:
        """A device that loads the changed kernels."""
        return MutantDriver(device(capability).device, self)


class MutantDriver(EmulatedDriver):
    """An emulated device that changes kernels as it loads them; `num_changed` are so many."""

    def __init__(self, described: Device, mutant: PtxMutant) -> None:
        super().__init__(described)
        self.mutant = mutant
        self.num_changed = 0

    def load(
        self, image: bytes, source: str, entry: str, threads: int, shared_bytes: int
    ) -> Function:
        changed = self.mutant.change(entry, source)
        self.num_changed += changed != source
        return super().load(image, changed, entry, threads, shared_bytes)


def barrier(kernel: str, place: int | None = None) -> PtxMutant:
    """Without a barrier."""
    return PtxMutant(kernel, r"bar\.sync[ \t]+0;", "", place)


ChangeLaunch = Callable[[Launch], Launch | None]


def launches(kernel: str, change: ChangeLaunch) -> ChangePlan:
    """Another launch, or none, for each launch of a kernel of this name."""

    def changed(plan: LaunchPlan) -> LaunchPlan:
        forms = tuple(_changed(form, kernel, change) for form in plan.forms)
        return replace(plan, forms=forms)

    return changed


def _changed(form: Form, kernel: str, change: ChangeLaunch) -> Form:
    found = [
        change(one) if one.kernel.rpartition("-")[0] == kernel else one for one in form.launches
    ]
    return replace(form, launches=tuple(one for one in found if one is not None))


def no_launch(launch: Launch) -> None:
    """Nothing instead."""


def smaller_grid(axis: int) -> ChangeLaunch:
    """A block less along an axis."""

    def change(launch: Launch) -> Launch:
        grid = list(launch.grid)
        size = grid[axis]
        grid[axis] = replace(size, offset=size.offset - size.divisor)
        return replace(launch, grid=tuple(grid))

    return change


def argument(place: int, change: Callable[[Argument], Argument]) -> ChangeLaunch:
    """Another argument."""

    def changed(launch: Launch) -> Launch:
        given = list(launch.arguments)
        given[place] = change(given[place])
        return replace(launch, arguments=tuple(given))

    return changed


def number(
    kind: type[Integer | Real], place: int, change: Callable[[Argument], Argument]
) -> ChangeLaunch:
    """Another number: the `place`-th of the arguments of a kind."""

    def changed(launch: Launch) -> Launch | None:
        places = [at for at, one in enumerate(launch.arguments) if isinstance(one, kind)]
        return argument(places[place], change)(launch)

    return changed


def pointer(name: str, change: Callable[[Argument], Argument]) -> ChangeLaunch:
    """Another pointer, for the first to that space or to an array whose name begins so."""

    def changed(launch: Launch) -> Launch | None:
        for place, one in enumerate(launch.arguments):
            if isinstance(one, Pointer) and (one.space == name or one.name.startswith(name)):
                return argument(place, change)(launch)
        raise LookupError(name)

    return changed


def moved(num_bytes: int) -> Callable[[Argument], Argument]:
    """A pointer to another place."""

    def change(argument: Argument) -> Argument:
        assert isinstance(argument, Pointer)
        return replace(argument, offset=argument.offset + num_bytes)

    return change


def more(count: int) -> Callable[[Argument], Argument]:
    """An integer that is greater."""

    def change(argument: Argument) -> Argument:
        assert isinstance(argument, Integer)
        value: Extent = argument.value
        return Integer(replace(value, offset=value.offset + count * value.divisor))

    return change


def other_real(value: float) -> Callable[[Argument], Argument]:
    """Another number."""
    return lambda argument: Real(value)
