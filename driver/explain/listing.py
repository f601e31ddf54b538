"""A program listed under names that only its structure decides, and its equal layers folded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...ir.plan import loop_groups, planned_arena
from ...ir.program import EMPTY_SPEC, Attr, Node, Operand, Program, Value, WeightExpr, WeightRef
from ...ir.text import print_attr, print_expr, spoken_attrs

_LONGEST_PERIOD = 12
_MANY = 3
"""A value that so many later layers read belongs to all of them, not to the next."""
_PLANNED = ("loops", "offsets")


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Layers `first` to `last`: a stretch of `period` layers that stands `repeats` times."""

    first: int
    period: int
    repeats: int

    @property
    def last(self) -> int:
        """The last layer of the run."""
        return self.first + self.period * self.repeats - 1

    @property
    def shown(self) -> range:
        """The layers that stand for all."""
        return range(self.first, self.first + self.period)

    def members(self, layer: int) -> range:
        """Every layer that the shown one stands for, itself included."""
        return range(layer, self.last + 1, self.period)


@dataclass(frozen=True, slots=True)
class Listing:
    """A program as lines in parts; two programs of the same structure have equal listings.

    A value is called after the module it came from, and the op that makes it unless it is the
    module's last; a weight of a layer without the layer's number; and a layer refers to the one
    before as `prev`, to what is in none as `outside`.
    """

    head: tuple[str, ...]
    before: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    plan: tuple[str, ...]

    def folded(self) -> list[str]:
        """All lines, equal layers once."""
        lines = [*self.head, "before the layers:", *self.before]
        for run in fold_layers(self.layers):
            for layer in run.shown:
                lines.append(f"{run_title(run, layer)}:")
                lines += self.layers[layer]
        return [*lines, "after the layers:", *self.after, *self.plan]


def run_title(run: LayerRun, layer: int) -> str:
    """What a shown layer stands for: "layer 0", or "layers 1-30: 30 equal"."""
    layers = run.members(layer)
    if len(layers) == 1:
        return f"layer {layer}"
    if run.period == 1:
        return f"layers {layers[0]}-{layers[-1]}: {len(layers)} equal"
    few = len(layers) <= 3
    start = ", ".join(str(one) for one in (layers if few else layers[:2]))
    end = "" if few else f" .. {layers[-1]}"
    return f"layers {start}{end}: {len(layers)} equal"


def fold_layers(layers: Sequence[object]) -> list[LayerRun]:
    """Runs that cover all layers in order: at each the shortest stretch that repeats furthest."""
    runs: list[LayerRun] = []
    at = 0
    while at < len(layers):
        period, repeats = 1, 1
        for length in range(1, min(_LONGEST_PERIOD, (len(layers) - at) // 2) + 1):
            count = _repeats(layers, at, length)
            if count > 1 and length * count > period * repeats:
                period, repeats = length, count
        runs.append(LayerRun(at, period, repeats))
        at += period * repeats
    return runs


def _repeats(layers: Sequence[object], start: int, length: int) -> int:
    count, at = 1, start + length
    while list(layers[at : at + length]) == list(layers[start : start + length]):
        count, at = count + 1, at + length
    return count


def list_program(program: Program) -> Listing:
    """The listing of a program."""
    return _Lister(program).list()


def relative_module(source: str | None, layer: int | None) -> str:
    """Where in its layer a node came from: "self_attn.q_proj"; the whole path outside layers."""
    if source is None:
        return ""
    parts = source.split(".")
    if layer is not None and str(layer) in parts:
        parts = parts[parts.index(str(layer)) + 1 :]
    return ".".join(parts)


class _Lister:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.layer_of: dict[str, int | None] = {}
        self.names: dict[str, str] = {}
        self.loop_of = {name: group[0] == name for group in loop_groups(program) for name in group}
        self._name_values()
        self.users = self._weight_users()
        self.shared = self._shared_values()
        self.readers = Counter(node.attrs.get("cache") for node in program.nodes)

    def list(self) -> Listing:
        program = self.program
        count = max((node.layer + 1 for node in program.nodes if node.layer is not None), default=0)
        layers: list[list[str]] = [[] for _ in range(count)]
        outside: tuple[list[str], list[str]] = ([], [])
        seen = False
        for node in program.nodes:
            if node.layer is None:
                outside[seen].append(self._line(node, None))
            else:
                seen = True
                layers[node.layer].append(self._line(node, node.layer))
        for name, users in self.users.items():
            if len(users) == 1 and (layer := next(iter(users))) is not None:
                layers[layer].append(self._weight(name, layer))
        named = [f"{name} = " for name in program.output_names] or [""] * len(program.outputs)
        pairs = zip(named, program.outputs, strict=True)
        outputs = ", ".join(f"{name}%{self.names[value.name]}" for name, value in pairs)
        return Listing(
            tuple(self._head()),
            tuple(outside[0]),
            tuple(tuple(lines) for lines in layers),
            (*outside[1], f"  output {outputs}"),
            tuple(self._plan()),
        )

    def _name_values(self) -> None:
        counts: Counter[tuple[int | None, str]] = Counter()
        last = {
            (node.layer, relative_module(node.source, node.layer)): node
            for node in self.program.nodes
        }
        for value in self.program.inputs:
            self.names[value.name] = value.name
            self.layer_of[value.name] = None
        for node in self.program.nodes:
            module = relative_module(node.source, node.layer)
            stem = f"{module}.{node.op}" if module else node.op
            if module and last[node.layer, module] is node:
                stem = module  # so that another op in its place leaves those who read it alone
            counts[node.layer, stem] += 1
            number = counts[node.layer, stem]
            base = stem if number == 1 else f"{stem}.{number}"
            for place, value in enumerate(node.outputs):
                self.names[value.name] = f"{base}#{place}" if place else base
                self.layer_of[value.name] = node.layer

    def _weight_users(self) -> dict[str, set[int | None]]:
        users: dict[str, set[int | None]] = {name: set() for name in self.program.weights}
        for node in self.program.nodes:
            for ref in node.weights():
                users[ref.name].add(node.layer)
        return users

    def _shared_values(self) -> set[str]:
        """What a layer makes for many others, such as a table: named by that layer in all."""
        readers: dict[str, set[int | None]] = {}
        for node in self.program.nodes:
            for value in node.values():
                readers.setdefault(value.name, set()).add(node.layer)
        return {
            name
            for name, layers in readers.items()
            if len(layers - {self.layer_of[name], None}) >= _MANY
        }

    def _head(self) -> Iterator[str]:
        program = self.program
        yield f"program {print_attr(program.name)} phase {program.phase}"
        for name, bounds in program.symbols.items():
            yield f"  symbol {name}: {bounds.low}..{bounds.high}"
        if program.spec != EMPTY_SPEC:
            for name, value in dataclasses.asdict(program.spec).items():
                yield f"  spec {name} = {print_attr(value)}"
        for group in program.resources:
            fields = {name: print_attr(v) for name, v in group.plain().items()}
            yield f"  resource {', '.join(f'{name} = {text}' for name, text in fields.items())}"
        for name, attr in program.attrs.items():
            if name not in _PLANNED:
                yield f"  attr {name} = {print_attr(attr)}"
        for value in program.inputs:
            yield f"  input %{value.name}: {value.type}"
        for name, users in self.users.items():
            if len(users) != 1 or None in users:
                yield self._weight(name, None)

    def _plan(self) -> Iterator[str]:
        """Places in the arena: one line, as no two layers need to have the same ones."""
        offsets = planned_arena(self.program).offsets
        if offsets:
            yield "arena:"
        for name, offset in offsets.items():
            layer = self.layer_of.get(name)
            prefix = "" if layer is None else f"layer {layer} "
            yield f"  {prefix}%{self.names.get(name, name)} at {offset}"

    def _line(self, node: Node, layer: int | None) -> str:
        inputs = ", ".join(self._operand(operand, layer) for operand in node.inputs)
        attrs = ", ".join(
            f"{name} = {self._attr(name, value, layer)}"
            for name, value in spoken_attrs(node).items()
            if name != "layer" or value != layer
        )
        text = f"  {', '.join(f'%{self.names[value.name]}' for value in node.outputs)}"
        text += f"{' = ' if node.outputs else ''}{node.op}({inputs})"
        text += f" {{{attrs}}}" if attrs else ""
        text += f" : {', '.join(str(value.type) for value in node.outputs)}" if node.outputs else ""
        first = self.loop_of.get(node.outputs[0].name) if node.outputs else None
        return text if first is None else f"{text}  [{'a loop' if first else 'same loop'}]"

    def _operand(self, operand: Operand, layer: int | None) -> str:
        if isinstance(operand, Value):
            name, home = self.names[operand.name], self.layer_of[operand.name]
            if home == layer or operand in self.program.inputs:
                return f"%{name}"
            if home is None:
                return f"%outside:{name}"
            if layer is None or operand.name in self.shared:
                return f"%layer {home}:{name}"
            return f"%prev:{name}" if home == layer - 1 else f"%layer{home - layer:+d}:{name}"
        if isinstance(operand, WeightRef):
            return f"@{self._weight_name(operand.name)}"
        return print_attr(operand)

    def _attr(self, name: str, value: Attr, layer: int | None) -> str:
        if name != "cache" or not isinstance(value, int) or layer is None:
            return print_attr(value)
        return str(value) if self.readers[value] >= _MANY else f"layer{value - layer:+d}"

    def _weight_name(self, name: str) -> str:
        users = self.users[name]
        return _without_layer(name, next(iter(users)) if len(users) == 1 else None)

    def _weight(self, name: str, layer: int | None) -> str:
        weight = self.program.weights[name]
        expr = _expr_without_layer(weight.expr, layer)
        return f"  weight @{self._weight_name(name)}: {weight.type} = {print_expr(expr)}"


def _without_layer(name: str, layer: int | None) -> str:
    parts = name.split(".")
    if layer is not None and str(layer) in parts:
        parts[parts.index(str(layer))] = "*"
    return ".".join(parts)


def _expr_without_layer(expr: WeightExpr, layer: int | None) -> WeightExpr:
    attrs: Mapping[str, Attr] = {
        name: _without_layer(value, layer) if isinstance(value, str) else value
        for name, value in expr.attrs.items()
    }
    inputs = tuple(_expr_without_layer(part, layer) for part in expr.inputs)
    return dataclasses.replace(expr, attrs=attrs, inputs=inputs)
