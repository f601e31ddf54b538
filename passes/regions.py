"""What a pass changed: pairs of small subgraphs, before and after, between values that survived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..ir.analyses import depends_only_on
from ..ir.ops import get_op
from ..ir.program import Node, Operand, Program, Value, WeightExpr, WeightRef
from ..ir.types import Dim, TensorType
from ..ir.weights import LEAVES


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a region: the nodes that make `output` from the region's inputs."""

    program: Program
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    output: Value


@dataclass(frozen=True, slots=True)
class Region:
    """The same value, computed in two ways from the same values (inputs pairwise by name)."""

    before: Side
    after: Side

    @property
    def has_effects(self) -> bool:
        """Whether a node touches paged state, which a region cannot be run on."""
        return any(get_op(n.op).effects for n in (*self.before.nodes, *self.after.nodes))


def without_units(kind: TensorType) -> tuple[object, tuple[Dim, ...]]:
    """A type up to dimensions of size 1."""
    return kind.dtype, tuple(dim for dim in kind.shape if dim != 1)


def find_regions(before: Program, after: Program) -> Iterator[Region]:
    """A region for every surviving value that is computed in another way, and every output.

    Values survive under their name; their type may gain or lose dimensions of size 1. Regions are
    cut at surviving floating-point values and at inputs: what is cut at is a region of its own.
    """
    finder = _Finder(before, after)
    for name in finder.changed():
        yield finder.region(finder.old_values[name], finder.new_values[name])
    for old, new in zip(before.outputs, after.outputs, strict=True):
        if old.name != new.name:
            yield finder.region(old, new)


class _Finder:
    def __init__(self, before: Program, after: Program) -> None:
        self.before, self.after = before, after
        self.old, self.new = before.producers(), after.producers()
        self.old_values = _values(before)
        self.new_values = _values(after)
        self.orders = {
            id(program): {id(node): i for i, node in enumerate(program.nodes)}
            for program in (before, after)
        }
        self.place = {name: i for i, name in enumerate(self.old)}
        self.inputs = {v.name for v in before.inputs}
        shared = self.old_values.keys() & self.new_values.keys()
        self.survivors = {
            name
            for name in shared
            if without_units(self.old_values[name].type)
            == without_units(self.new_values[name].type)
        }
        # What positions alone decide takes the values it has: random ones would hide a fault that
        # shows at one position only.
        decided = depends_only_on(before, {"positions"})
        self.cuts = self.inputs | {
            name
            for name in self.survivors
            if self.old_values[name].type.dtype.is_float and name not in decided
        }

    def changed(self) -> list[str]:
        """The survivors that another node makes than before, in the order of the new program."""
        return [
            name
            for name in self.new
            if name in self.survivors and name in self.old and not self._same(name)
        ]

    def _same(self, name: str) -> bool:
        old, new = self.old[name], self.new[name]
        if replace(old, layer=new.layer) != new:
            return False
        weights = [ref.name for ref in new.weights()]
        return all(self.before.weights[w] == self.after.weights[w] for w in weights)

    def region(self, old: Value, new: Value) -> Region:
        """The region that makes one value, both sides from the same values.

        What one side alone is cut at (a value that the other side computes from something older)
        is opened, latest first, until both are cut at the same values.
        """
        opened: set[str] = set()
        while True:
            old_nodes, old_cuts = self._cone(self.before, self.old, old, opened)
            new_nodes, new_cuts = self._cone(self.after, self.new, new, opened)
            alone = set(old_cuts) ^ set(new_cuts)
            # An input that one side alone reads may be behind what the other is cut at.
            openable = alone - self.inputs or {*old_cuts, *new_cuts} - self.inputs
            stateful = any(get_op(node.op).effects for node in (*old_nodes, *new_nodes))
            if not alone or not openable or stateful:
                break
            opened.add(max(openable, key=lambda name: self.place[name]))
        names = list(dict.fromkeys([*old_cuts, *new_cuts]))
        return Region(
            Side(self.before, tuple(self.old_values[n] for n in names), old_nodes, old),
            Side(self.after, tuple(self.new_values[n] for n in names), new_nodes, new),
        )

    def _cone(
        self, program: Program, producers: Mapping[str, Node], output: Value, opened: set[str]
    ) -> tuple[tuple[Node, ...], list[str]]:
        """The nodes behind a value up to the cuts (in program order), and the cuts they read."""
        found: dict[int, Node] = {}
        cuts: dict[str, None] = {}
        start = producers.get(output.name)
        if start is None:
            return (), [output.name]
        stack = [start]
        while stack:
            node = stack.pop()
            if id(node) in found:
                continue
            found[id(node)] = node
            for value in node.values():
                cut = value.name in self.cuts and value.name not in opened
                if cut or value.name not in producers:
                    cuts[value.name] = None
                else:
                    stack.append(producers[value.name])
        order = self.orders[id(program)]
        return tuple(sorted(found.values(), key=lambda n: order[id(n)])), list(cuts)


def _values(program: Program) -> dict[str, Value]:
    found = {value.name: value for value in program.inputs}
    found.update((value.name, value) for node in program.nodes for value in node.outputs)
    return found


def signature(region: Region) -> str:
    """What decides a region's numbers: equal layers have equal signatures.

    Names of values and of checkpoint tensors are replaced by numbers in order of appearance over
    both sides, so that a side which reads another layer's weight does not look like its twins.
    """
    leaves: dict[str, int] = {}
    parts: list[str] = []
    for side in (region.before, region.after):
        known = {value.name: f"i{i}" for i, value in enumerate(side.inputs)}
        for value in side.inputs:
            label = value.name if value in side.program.inputs else ""
            parts.append(f"{known[value.name]}:{label} {value.type}")
        for index, node in enumerate(side.nodes):
            operands = ", ".join(_spell(side, operand, known, leaves) for operand in node.inputs)
            attrs = {k: v for k, v in node.attrs.items() if k != "layer"}
            parts.append(f"{node.op}({operands}){attrs}")
            known.update((v.name, f"n{index}.{i}") for i, v in enumerate(node.outputs))
        parts.append(f"-> {known.get(side.output.name)}")
    return "\n".join(parts)


def _spell(side: Side, operand: Operand, known: Mapping[str, str], leaves: dict[str, int]) -> str:
    if isinstance(operand, Value):
        return known.get(operand.name, "?")
    if isinstance(operand, WeightRef):
        weight = side.program.weights[operand.name]
        return f"{weight.type}={_spell_expr(weight.expr, leaves)}"
    return f"{type(operand).__name__} {operand!r}"


def _spell_expr(expr: WeightExpr, leaves: dict[str, int]) -> str:
    if expr.op in LEAVES:
        key = str(expr.attrs[LEAVES[expr.op]])
        return (
            f"{expr.op} {key}" if expr.op == "data" else f"#{leaves.setdefault(key, len(leaves))}"
        )
    inner = ", ".join(_spell_expr(part, leaves) for part in expr.inputs)
    return f"{expr.op}{dict(expr.attrs)}({inner})"
