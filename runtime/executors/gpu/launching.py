"""Launches made ready: their parameters as bytes, and those of a step in pieces to be captured."""

from __future__ import annotations

import contextlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from ....ir.launches import Argument, Extent, Form, Integer, Launch, Pointer, Real, TensorMap, When
from .arrays import Layout
from .driver import Driver, Function, MatrixMap

Sizes = Mapping[str, int]
Call = tuple[Function, tuple[int, ...], bytes, bool]
"""A launch with its numbers: function, grid, parameters, whether it is dependent."""

_MOST_KEPT: Final = 64
"""Of each piece, the graphs of so many combinations of sizes are kept."""

_FORMATS: Final = {Pointer: ("Q", 8, 8), Integer: ("i", 4, 4), Real: ("f", 4, 4)}
"""What an argument is to `struct`, its bytes, and its alignment."""


class Places:
    """Where pointers of launches point to.

    `fixed` gives the address of what never moves, or None; `base` is that of the buffer of packed
    arrays, and `growing` gives those of arrays that have moved when `GENERATION` changes.
    """

    def __init__(
        self,
        fixed: Callable[[Pointer], int | None],
        base: int,
        growing: Callable[[str], int | None],
        depends: Callable[[str], set[str]],
    ) -> None:
        self.fixed, self.base, self.growing, self._depends = fixed, base, growing, depends

    def address(self, pointer: Pointer, layout: Layout) -> int:
        """Where a pointer points to in a step of this layout."""
        found = self.fixed(pointer)
        if found is None:
            found = self.growing(pointer.name)
        if found is None:
            found = self.base + layout.offsets[pointer.name]
        return found + pointer.offset

    def depends(self, pointer: Pointer) -> set[str]:
        """The sizes that the address depends on."""
        return set() if self.fixed(pointer) is not None else self._depends(pointer.name)


class ReadyLaunch:
    """A launch of a kernel that was loaded.

    `sizes` are the names of those that grid and parameters depend on.
    """

    def __init__(self, launch: Launch, function: Function, places: Places, driver: Driver) -> None:
        self.when: When = launch.when
        self.entry, self.nodes = function.entry, launch.nodes
        # Blocks are copied in few steps, and as many as the step says: no graph has that.
        self.eager = launch.eager or launch.when == "copies"
        self._function, self._dependent = function, launch.dependent
        self._places, self._driver = places, driver
        self._grid = launch.grid
        self._most_blocks = driver.device.num_processors if launch.persistent else None
        maps = [one for one in launch.arguments if isinstance(one, TensorMap)]
        self._rows = tuple(extent for one in maps for extent in one.shape)
        self._format, self._arguments = _packing(launch.arguments)
        self._needed = tuple(sorted(set().union(*map(self._depends, launch.arguments))))
        of_grid = {extent.size for extent in launch.grid if extent.size is not None}
        self.sizes = {*self._needed, *of_grid}
        self._last: tuple[tuple[int, ...], bytes] | None = None

    def _depends(self, argument: Argument) -> set[str]:
        match argument:
            case Pointer():
                return self._places.depends(argument)
            case Integer(value=extent):
                return _named([extent])
            case TensorMap(base=base, shape=shape):
                return self._places.depends(base) | _named(shape)
        return set()

    def call(self, sizes: Sizes, layout: Layout) -> Call | None:
        """The launch for a step of these sizes; None where there is nothing to compute."""
        grid = tuple([extent.evaluate(sizes) for extent in self._grid])
        if 0 in grid or 0 in [extent.evaluate(sizes) for extent in self._rows]:
            return None
        if self._most_blocks is not None:
            grid = (min(grid[0], self._most_blocks), *grid[1:])
        key = tuple([sizes[name] for name in self._needed])
        if self._last is None or self._last[0] != key:
            self._last = key, self._parameters(sizes, layout)
        return self._function, grid, self._last[1], self._dependent

    def _parameters(self, sizes: Sizes, layout: Layout) -> bytes:
        values = [self._value(argument, sizes, layout) for argument in self._arguments]
        return self._format.pack(*values, 0, 0)

    def _value(self, argument: Argument, sizes: Sizes, layout: Layout) -> int | float | bytes:
        match argument:
            case Pointer():
                return self._places.address(argument, layout)
            case Integer(value=extent):
                return extent.evaluate(sizes)
            case Real(value=value):
                return value
            case TensorMap():
                shape = tuple(extent.evaluate(sizes) for extent in argument.shape)
                address = self._places.address(argument.base, layout)
                matrix = MatrixMap(
                    address, argument.dtype, shape, argument.box, argument.swizzle_bytes
                )
                return self._driver.descriptor(matrix)


def _named(extents: Sequence[Extent]) -> set[str]:
    return {extent.size for extent in extents if extent.size is not None}


def _packing(arguments: Sequence[Argument]) -> tuple[struct.Struct, tuple[Argument, ...]]:
    """The format of a kernel's parameters, behind which Triton takes two pointers of its own.

    Those are scratch memory of the kernel and of a profiler: it uses neither.
    """
    text, at = ["<"], 0
    for argument in (*arguments, *_TRAILING):
        code, size, alignment = _FORMATS.get(type(argument), ("128s", 128, 64))
        gap = -at % alignment
        text.append(f"{gap}x{code}" if gap else code)
        at += gap + size
    return struct.Struct("".join(text)), tuple(arguments)


_TRAILING: Final = (Pointer("arena", ""), Pointer("arena", ""))


@dataclass(slots=True)
class _Prepared:
    """The calls of a piece for some sizes, and their graph once it was captured."""

    calls: list[Call]
    graph: object | None = None


@dataclass(slots=True)
class Piece:
    """Launches one after the other, which are captured together or not at all.

    What was captured is used again only where every size is equal that grids, parameters and
    addresses depend on.
    """

    launches: list[ReadyLaunch]
    eager: bool
    sizes: tuple[str, ...]
    _kept: OrderedDict[tuple[int, ...], _Prepared] = field(default_factory=OrderedDict)

    def run(self, driver: Driver, sizes: Sizes, layout: Layout, *, capture: bool) -> None:
        """Launch it, as a graph if need be."""
        prepared = self._prepared(sizes, layout)
        if not capture or self.eager or len(prepared.calls) < 2:
            _launch(driver, prepared.calls)
            return
        if prepared.graph is None:
            prepared.graph = _captured(driver, prepared.calls)
        driver.replay(prepared.graph)

    def capture(self, driver: Driver, sizes: Sizes, layout: Layout) -> bool:
        """Capture it without running it; whether that had not been done."""
        prepared = self._prepared(sizes, layout)
        if self.eager or len(prepared.calls) < 2 or prepared.graph is not None:
            return False
        prepared.graph = _captured(driver, prepared.calls)
        return True

    def _prepared(self, sizes: Sizes, layout: Layout) -> _Prepared:
        key = tuple([sizes[name] for name in self.sizes])
        found = self._kept.get(key)
        if found is None:
            calls = [one.call(sizes, layout) for one in self.launches]
            found = self._kept[key] = _Prepared([call for call in calls if call is not None])
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found


def _launch(driver: Driver, calls: Sequence[Call]) -> None:
    for function, grid, parameters, dependent in calls:
        driver.launch(function, grid, parameters, dependent=dependent)


def _captured(driver: Driver, calls: Sequence[Call]) -> object:
    driver.begin_capture()
    try:
        _launch(driver, calls)
    except BaseException:
        with contextlib.suppress(Exception):  # the driver would record whatever comes next
            driver.end_capture()
        raise
    return driver.end_capture()


class ReadyForm:
    """The launches of a form, in pieces for each combination of what steps need."""

    def __init__(self, form: Form, launches: Sequence[ReadyLaunch]) -> None:
        self.form = form
        self.launches = launches
        self._pieces: dict[frozenset[When], list[Piece]] = {}
        self._halves: dict[frozenset[When], tuple[list[Piece], list[Piece]]] = {}
        self._made: dict[tuple[int, ...], Piece] = {}
        """By the places of its launches: steps that need other launches share what is equal."""

    def pieces(self, active: frozenset[When]) -> list[Piece]:
        """The launches of a step for which `active` holds."""
        found = self._pieces.get(active)
        if found is None:
            found = self._pieces[active] = self._cut(self._chosen(active))
        return found

    def halves(self, active: frozenset[When]) -> tuple[list[Piece], list[Piece]]:
        """The same in two: those before logits are adjusted, and those from there on."""
        found = self._halves.get(active)
        if found is None:
            chosen = self._chosen(active)
            adjusts = (i for i, at in enumerate(chosen) if self.launches[at].when == "adjusted")
            first = next(adjusts, len(chosen))
            found = self._halves[active] = self._cut(chosen[:first]), self._cut(chosen[first:])
        return found

    def _chosen(self, active: frozenset[When]) -> list[int]:
        return [place for place, one in enumerate(self.launches) if one.when in active]

    def _cut(self, places: Sequence[int]) -> list[Piece]:
        groups = groupby(places, key=lambda place: self.launches[place].eager)
        return [self._piece(tuple(group), eager) for eager, group in groups]

    def _piece(self, places: tuple[int, ...], eager: bool) -> Piece:
        found = self._made.get(places)
        if found is None:
            launches = [self.launches[place] for place in places]
            sizes = sorted(set().union(*(one.sizes for one in launches)))
            found = self._made[places] = Piece(launches, eager, tuple(sizes))
        return found
