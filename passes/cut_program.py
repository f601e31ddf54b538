"""A few layers of a model as a program of their own: the first of each kind, and the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.program import Node, Operand, Program, Value, WeightExpr, WeightRef
from ..ir.weights import LEAVES

MAX_KINDS: Final = 8
"""How many kinds of layers a cut program has at the most, beside the last layer."""
_MANY: Final = 3
"""A value that so many other layers read belongs to all of them, not to those near its own."""


def layers_of(program: Program) -> list[int]:
    """The layers that nodes of the program belong to, in order."""
    return sorted({node.layer for node in program.nodes if node.layer is not None})


def choose_layers(*programs: Program) -> list[int]:
    """The first layer of each kind, and the last; no more than MAX_KINDS kinds.

    Layers are of one kind where they are equal in all the programs but for their weights' values.
    """
    kinds = [layer_keys(program) for program in programs]
    layers = layers_of(programs[0])
    firsts: dict[tuple[str | None, ...], int] = {}
    for layer in layers:
        firsts.setdefault(tuple(keys.get(layer) for keys in kinds), layer)
    return sorted({*list(firsts.values())[:MAX_KINDS], *layers[-1:]})


def cut_program(program: Program, kept: Iterable[int]) -> Program | str:
    """The program with these layers alone, under their numbers; or why that cannot be.

    What a layer read of one that is gone, it reads of the nearest kept layer below that has the
    like. That is another model, but a whole one: what passes promise of a model they promise of it.
    """
    layers = sorted(kept)
    roles = _roles(program)
    like = {(layer, role, value.type): value for value, layer, role in roles.values()}
    builder = ProgramBuilder.from_program(program)

    def stand_in(value: Value) -> Value | None:
        _, layer, role = roles[value.name]
        for other in reversed(layers):
            if layer is not None and other < layer and (other, role, value.type) in like:
                return like[other, role, value.type]
        return None

    for node in program.nodes:
        if node.layer is None or node.layer in layers:
            builder.copy(node)
            continue
        for value in node.outputs:
            other = stand_in(value)
            if other is not None:
                builder.replace(value, other)
    made = {value.name for node in builder.nodes for value in node.outputs}
    made |= {value.name for value in program.inputs}
    for node in builder.nodes:
        for value in node.values():
            if value.name not in made:
                layer = roles[value.name][1]
                return f"{node.op} of layer {node.layer} reads {value} of layer {layer} alone"
    return remove_dead_code(builder.build())


def layer_keys(program: Program) -> dict[int | None, str]:
    """What decides each layer up to its weights' values; under None all that is in no layer."""
    return _Keys(program).keys()


class _Keys:
    """Spells nodes under names that do not say which layer they are of."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.roles = _roles(program)
        self.place = {layer: i for i, layer in enumerate(layers_of(program))}
        readers: dict[str, set[int | None]] = {}
        for node in program.nodes:
            for value in node.values():
                readers.setdefault(value.name, set()).add(node.layer)
        self.shared = {name for name, layers in readers.items() if len(layers) > _MANY}

    def keys(self) -> dict[int | None, str]:
        lines: dict[int | None, list[str]] = {}
        for node in self.program.nodes:
            lines.setdefault(node.layer, []).append(self._line(node))
        return {layer: "\n".join(own) for layer, own in lines.items()}

    def _line(self, node: Node) -> str:
        inputs = ", ".join(self._operand(operand, node.layer) for operand in node.inputs)
        attrs = {name: v for name, v in node.attrs.items() if name != "layer" or v != node.layer}
        if attrs.get("cache") is not None:
            attrs["cache"] = "another layer's"  # of the same kind wherever it is
        results = ", ".join(f"{self.roles[v.name][2]}: {v.type}" for v in node.outputs)
        return f"{results} = {node.op}({inputs}) {attrs!r}"

    def _operand(self, operand: Operand, layer: int | None) -> str:
        if isinstance(operand, WeightRef):
            weight = self.program.weights[operand.name]
            return f"{weight.type} = {_spell(weight.expr, layer)}"
        if not isinstance(operand, Value):
            return repr(operand)
        _, home, role = self.roles[operand.name]
        if home is None or home == layer:
            return role if home == layer else f"outside {role}"
        if layer is None or operand.name in self.shared:
            last = home == max(self.place)
            return f"{'the last layer' if last else f'layer {home}'}: {role}"
        return f"{self.place[layer] - self.place[home]} below: {role}"


def _roles(program: Program) -> dict[str, tuple[Value, int | None, str]]:
    """By name: each value with its layer, and what it is there: the module, op and number."""
    found = {value.name: (value, None, value.name) for value in program.inputs}
    roles: dict[str, tuple[Value, int | None, str]] = dict(found)
    counts: Counter[tuple[int | None, str]] = Counter()
    for node in program.nodes:
        stem = f"{_module(node.source, node.layer)} {node.op}"
        counts[node.layer, stem] += 1
        for place, value in enumerate(node.outputs):
            role = f"{stem} {counts[node.layer, stem]}.{place}"
            roles[value.name] = (value, node.layer, role)
    return roles


def _module(source: str | None, layer: int | None) -> str:
    return ".".join(_without(layer, (source or "").split(".")))


def _spell(expr: WeightExpr, layer: int | None) -> str:
    if expr.op in LEAVES:
        name = str(expr.attrs[LEAVES[expr.op]])
        return f"{expr.op} {'.'.join(_without(layer, name.split('.')))}"
    return (
        f"{expr.op}{dict(expr.attrs)!r}({', '.join(_spell(part, layer) for part in expr.inputs)})"
    )


def _without(layer: int | None, parts: Sequence[str]) -> Iterator[str]:
    """The parts of a path, with a star for the first that is the layer's number."""
    seen = False
    for part in parts:
        mine = not seen and layer is not None and part == str(layer)
        seen = seen or mine
        yield "*" if mine else part
