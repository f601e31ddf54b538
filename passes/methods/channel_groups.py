"""Groups of products that read the same channels, and what the channels can be divided in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ...ir.formats import GGUF_FORMATS
from ...ir.program import Node, Operand, Program, Value, WeightRef
from ...ir.schemes import Scheme
from ...ir.types import Sym
from ...ir.weights import LEAVES, leaves
from ..near_miss import NearMiss

if TYPE_CHECKING:
    import torch

    Places = torch.Tensor

_MATRIX: Final = {"linear": 1, "moe": 3}
"""Ops whose operand 0 is a row of channels, and which operand is the matrix of `[.., N, K]`."""
_NORMS: Final = frozenset({"rms_norm", "layer_norm"})


@dataclass(frozen=True, slots=True, eq=False)
class Divided:
    """A weight in which channels are divided, and which of its elements or rows each one is.

    `places` `[K]` are elements of a vector or rows of a matrix. `made_by` is the node that makes
    the vector of the weight (`1 + w`), where the vector is not the weight itself.
    """

    weight: str
    places: Places
    made_by: Node | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Products of the same rows `[.., K]`, whose matrices are scaled together.

    `matrices` have the scheme of each, or None for one that is not quantised. `path` are the nodes
    whose results are divided, from the rows backwards; `divided` is where that is done. `classes`
    `[K]` numbers the channels: those with the same number must have the same scale.
    """

    rows: Value
    readers: tuple[Node, ...]
    matrices: Mapping[str, Scheme | None]
    path: tuple[Node, ...]
    divided: tuple[Divided, ...]
    classes: Places

    @property
    def name(self) -> str:
        """The name of its first matrix, by which it is known when passes run again."""
        return next(iter(self.matrices))

    @property
    def depth(self) -> int:
        """How many channels there are."""
        return len(self.classes)


def find_groups(
    program: Program, schemes: Mapping[int, Scheme], heads: set[int]
) -> tuple[list[ChannelGroup], list[NearMiss]]:
    """The groups whose channels can be scaled, in program order; and of others why not.

    `schemes` are those of the nodes that will be quantised, by id; `heads` the ids of the products
    that make the outputs.
    """
    finder = _Finder(program, schemes, heads)
    found: list[ChannelGroup] = []
    misses = []
    for value, readers in finder.rows():
        group = finder.group(value, readers)
        if isinstance(group, ChannelGroup):
            found.append(group)
        else:
            misses.append(NearMiss.at(readers[0], f"not scaled, {group}"))
    return found, misses


@dataclass(slots=True)
class _Trail:
    """What has been met on the way back from rows to where they can be divided."""

    path: list[Node] = field(default_factory=list)
    divided: list[Divided] = field(default_factory=list)


class _Finder:
    def __init__(self, program: Program, schemes: Mapping[int, Scheme], heads: set[int]) -> None:
        self.program, self.schemes, self.heads = program, schemes, heads
        self.producers, self.consumers = program.producers(), program.consumers()
        self.outputs = {value.name for value in program.outputs}
        self.users: dict[str, list[Node]] = {}
        for node in program.nodes:
            for ref in node.weights():
                self.users.setdefault(ref.name, []).append(node)
        self.tables = {
            leaf
            for node in program.nodes
            if node.op in ("embedding", "scaled_embedding")
            for ref in node.weights()
            for leaf in self._leaves(ref)
        }

    def rows(self) -> list[tuple[Value, list[Node]]]:
        """Every value that a product which will be quantised reads, with all that read it."""
        found: dict[str, Value] = {}
        for node in self.program.nodes:
            if id(node) in self.schemes and node.op in _MATRIX:
                value = node.inputs[0]
                assert isinstance(value, Value)
                found.setdefault(value.name, value)
        return [(value, self.consumers[name]) for name, value in found.items()]

    def group(self, rows: Value, readers: Sequence[Node]) -> ChannelGroup | str:
        """The group of what reads `rows`, or why its channels stay as they are."""
        import torch

        matrices: dict[str, Scheme | None] = {}
        if any(id(node) in self.heads for node in readers):
            return "it is the head"
        if rows.name in self.outputs:
            return f"{rows} is an output"
        for node in readers:
            if node.op not in _MATRIX or node.values().count(rows) != 1 or node.inputs[0] != rows:
                return f"{node.op} reads {rows} as well"
            ref = node.inputs[_MATRIX[node.op]]
            if (reason := self._is_free(ref, readers)) is not None:
                return reason
            matrices[str(ref).removeprefix("@")] = self.schemes.get(id(node))
        depth = rows.type.shape[-1]
        assert isinstance(depth, int)
        trail = _Trail()
        reason = self._back(rows, torch.arange(depth), trail)
        if reason is not None:
            return reason
        classes = trail.divided[-1].places
        for one in trail.divided:
            if len(_pairs(one.places, classes)) != len(one.places.unique()):
                return f"an element of @{one.weight} belongs to channels that differ"
        return ChannelGroup(
            rows, tuple(readers), matrices, tuple(trail.path), tuple(trail.divided), classes
        )

    def _is_free(self, ref: Operand, readers: Sequence[Node]) -> str | None:
        """Why a weight cannot be changed; None where only these nodes read it."""
        if not isinstance(ref, WeightRef):
            return "a matrix or vector is computed"
        if any(all(node is not one for one in readers) for node in self.users[ref.name]):
            return f"{ref} is read elsewhere"
        if self._leaves(ref) & self.tables:
            return f"{ref} is a table as well"
        expr = self.program.weights[ref.name].expr
        if any(leaf.op == "calibrated" for leaf in leaves(expr)):
            return f"{ref} is calibrated already"
        return None

    def _leaves(self, ref: WeightRef) -> set[str]:
        found = leaves(self.program.weights[ref.name].expr)
        return {f"{leaf.op} {leaf.attrs[LEAVES[leaf.op]]}" for leaf in found}

    def _back(self, value: Value, places: Places, trail: _Trail) -> str | None:
        """Follows channels back to where they can be divided; or says why they cannot be.

        `places` `[K]` are the channels' elements of `value`, all dimensions but that of tokens in
        one.
        """
        node = self.producers.get(value.name)
        shape = value.type.shape
        if node is None:
            return f"{value} is an input"
        sizes = [dim for dim in shape[1:] if isinstance(dim, int)]
        if len(sizes) != len(shape) - 1 or not sizes or not isinstance(shape[0], Sym):
            return f"{value} is {value.type}, not rows of tokens"
        trail.path.append(node)
        if node.op == "linear" or node.op in _NORMS:
            return self._divide(node, node.inputs[1:], places % sizes[-1], trail)
        if node.op in ("mul", "add"):
            return self._pointwise(node, places, sizes, trail)
        if node.op == "slice":
            return self._part(node, places, trail)
        if node.op in ("reshape", "transpose", "attention"):
            return self._moved(node, places, sizes, trail)
        return f"what {node.op} makes cannot be divided in a weight"

    def _pointwise(
        self, node: Node, places: Places, sizes: Sequence[int], trail: _Trail
    ) -> str | None:
        vectors = [one for one in node.inputs if self._vector_of(one, sizes[-1]) is not None]
        others = [one for one in node.inputs if isinstance(one, Value) and one not in vectors]
        if node.op == "add":
            if len(vectors) != 1 or len(others) != 1:
                return "a sum cannot be divided in one weight"
            found = self._divide(node, vectors, places % sizes[-1], trail)
            return found or self._next(others[0], node, places, trail)
        if vectors:
            return self._divide(node, vectors[:1], places % sizes[-1], trail)
        reason: str | None = "no factor of a product can be divided"
        for one in others:
            attempt = _Trail(list(trail.path), list(trail.divided))
            if one.type.shape == node.output.type.shape:
                reason = self._next(one, node, places, attempt)
                if reason is None:
                    trail.path, trail.divided = attempt.path, attempt.divided
                    return None
        return reason

    def _moved(self, node: Node, places: Places, sizes: Sequence[int], trail: _Trail) -> str | None:
        source = node.inputs[2 if node.op == "attention" else 0]
        assert isinstance(source, Value)
        if node.op == "attention":
            heads = source.type.shape[1]
            assert isinstance(heads, int)
            head = places // sizes[-1] // (sizes[0] // heads)
            return self._next(source, node, head * sizes[-1] + places % sizes[-1], trail)
        if source.type.shape[0] != node.output.type.shape[0]:
            return f"{node.op} moves the tokens"
        if node.op == "transpose":
            perm = node.attrs["perm"]
            assert isinstance(perm, tuple)
            inner = [axis for axis in perm if isinstance(axis, int)]
            if inner[0] != 0:
                return "transpose moves the tokens"
            import torch

            before = [dim for dim in source.type.shape[1:] if isinstance(dim, int)]
            order = torch.arange(math.prod(before)).reshape(before)
            places = order.permute([axis - 1 for axis in inner[1:]]).reshape(-1)[places]
        return self._next(source, node, places, trail)

    def _part(self, node: Node, places: Places, trail: _Trail) -> str | None:
        """Goes on with a row that others read other parts of."""
        (source,) = node.values()
        if source.type.rank != 2 or source.name in self.outputs:
            return f"{source} is not a row of its own"
        mine = _range(node)
        if mine is None:
            return f"{node.output} is no range of a row"
        for other in self.consumers[source.name]:
            theirs = _range(other) if other.op == "slice" else None
            if theirs is None or (other is not node and _overlap(mine, theirs)):
                return f"{source} has other readers"
        return self._back(source, places + mine[0], trail)

    def _next(self, value: Value, reader: Node, places: Places, trail: _Trail) -> str | None:
        """Goes on with a value that nothing else reads."""
        if self.consumers[value.name] != [reader] or reader.values().count(value) != 1:
            return f"{value} has other readers"
        if value.name in self.outputs:
            return f"{value} is an output"
        return self._back(value, places, trail)

    def _vector_of(self, operand: Operand, depth: int) -> tuple[WeightRef, Node | None] | None:
        """The weight that a vector of so many elements is, or is computed from alone."""
        if isinstance(operand, WeightRef):
            found = self.program.weights[operand.name].type.shape == (depth,)
            return (operand, None) if found else None
        if not isinstance(operand, Value) or operand.type.shape != (depth,):
            return None
        node = self.producers.get(operand.name)
        if node is None or node.values() or len(node.weights()) != 1:
            return None
        is_alone = len(self.consumers[operand.name]) == 1 and operand.name not in self.outputs
        return (node.weights()[0], node) if is_alone else None

    def _divide(
        self, node: Node, operands: Sequence[Operand], places: Places, trail: _Trail
    ) -> str | None:
        scheme = self.schemes.get(id(node))
        if scheme is not None and scheme.weight.name in GGUF_FORMATS:
            return f"the scales of {scheme.name} in the product before it have too small a range"
        if not operands:
            return f"{node.op} has no weight"
        size = node.output.type.shape[-1]
        assert isinstance(size, int)
        for operand in operands:
            ref, made_by = self._vector_of(operand, size) or (operand, None)
            if (reason := self._is_free(ref, [made_by or node])) is not None:
                return reason
            assert isinstance(ref, WeightRef)
            if any(one.weight == ref.name for one in trail.divided):
                return f"{ref} is read twice"
            trail.divided.append(Divided(ref.name, places, made_by))
        return None


def _range(node: Node) -> tuple[int, int] | None:
    """The elements of a row that a slice takes; None for a slice of tokens, or with a step."""
    start, stop = node.attrs["start"], node.attrs["stop"]
    if node.attrs["dim"] != 1 or node.attrs["step"] != 1:
        return None
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    return start, stop


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _pairs(first: Places, second: Places) -> set[tuple[int, int]]:
    return set(zip(first.tolist(), second.tolist(), strict=True))
