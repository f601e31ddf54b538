"""Building programs: nodes with inferred types and stable names, and edits that keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import ProgramError
from .ops import get_op
from .ops.base import OperandType
from .program import (
    EMPTY_SPEC,
    Attr,
    ModelSpec,
    Node,
    Operand,
    Program,
    Value,
    Weight,
    WeightExpr,
    WeightLoader,
    WeightRef,
)
from .resources import Resource
from .types import SymbolRange, TensorType


class ProgramBuilder:
    """Grows a program node by node; every node's types are inferred, every name is fresh.

    `layer` is given to the nodes added next (unless the call says otherwise), as is `source`.
    """

    def __init__(self, name: str, spec: ModelSpec = EMPTY_SPEC, phase: str = "captured") -> None:
        self.name = name
        self.spec = spec
        self.phase = phase
        self.layer: int | None = None
        self.source: str | None = None
        self.symbols: dict[str, SymbolRange] = {}
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.outputs: list[Value] = []
        self.output_names: list[str] = []
        self.weights: dict[str, Weight] = {}
        self.resources: tuple[Resource, ...] = ()
        self.attrs: dict[str, Attr] = {}
        self.loaders: dict[str, WeightLoader] = {}
        self._names: set[str] = set()
        self._next = 0
        self._replaced: dict[str, Operand] = {}

    @classmethod
    def from_program(cls, program: Program) -> ProgramBuilder:
        """A builder with everything of `program` but its nodes: `copy` those that stay.

        Names of the old nodes stay reserved, so that new values never take one of them. The
        outputs are the program's, after `replace`; set `outputs` to say otherwise.
        """
        builder = cls(program.name, program.spec, program.phase)
        builder.symbols = dict(program.symbols)
        builder.inputs = list(program.inputs)
        builder.outputs = list(program.outputs)
        builder.output_names = list(program.output_names)
        builder.weights = dict(program.weights)
        builder.resources = program.resources
        builder.attrs = dict(program.attrs)
        builder.loaders = dict(program.loaders)
        builder._names = value_names(program)
        return builder

    def symbol(self, name: str, low: int = 1, high: int = 1 << 20) -> None:
        """Declare a symbol with its inclusive bounds."""
        self.symbols[name] = SymbolRange(low, high)

    def input(self, name: str, kind: TensorType) -> Value:
        """Declare an input of the program."""
        if name in self._names:
            raise ProgramError(f"the name %{name} is taken")
        self._names.add(name)
        value = Value(name, kind)
        self.inputs.append(value)
        return value

    def weight(self, name: str, kind: TensorType, expr: WeightExpr | None = None) -> WeightRef:
        """Declare a weight; without an expression it is the checkpoint tensor of its name.

        Declaring the same weight again is allowed where the definition is equal.
        """
        defined = Weight(name, kind, expr or WeightExpr("checkpoint", (), {"name": name}))
        if self.weights.setdefault(name, defined) != defined:
            raise ProgramError(f"the weight @{name} is defined twice, differently")
        return WeightRef(name)

    def fresh_weight_name(self, hint: str) -> str:
        """`hint`, or `hint.1`, `hint.2`, ... where that is taken."""
        name, count = hint, 0
        while name in self.weights:
            count += 1
            name = f"{hint}.{count}"
        return name

    def fresh_name(self, hint: str | None = None) -> str:
        """A value name that nothing has: the next number, or one made from `hint`."""
        if hint is None:
            while str(self._next) in self._names:
                self._next += 1
            name = str(self._next)
        else:
            name, count = hint, 0
            while name in self._names:
                count += 1
                name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def operand_type(self, operand: Operand) -> OperandType:
        """The type of an operand; ProgramError for a weight that is not declared."""
        if isinstance(operand, Value):
            return operand.type
        if isinstance(operand, WeightRef):
            if operand.name not in self.weights:
                raise ProgramError(f"the weight @{operand.name} is not declared")
            return self.weights[operand.name].type
        return operand

    def add(
        self,
        op: str,
        inputs: Sequence[Operand],
        attrs: Mapping[str, Any] | None = None,
        *,
        names: Sequence[str | None] = (),
        layer: int | None = None,
        source: str | None = None,
    ) -> Node:
        """Append a node; attributes are completed, result types inferred, names made fresh.

        `names` are hints for the results' names, one each or none at all.
        """
        known = get_op(op)
        operands = tuple(self._resolve(operand) for operand in inputs)
        types = tuple(self.operand_type(operand) for operand in operands)
        full = known.complete(attrs or {}, types)
        kinds = known.infer(types, full)
        hints = list(names) or [None] * len(kinds)
        if len(hints) != len(kinds):
            raise ProgramError(f"{op} has {len(kinds)} results, given {len(hints)} names")
        outputs = tuple(
            Value(self.fresh_name(hint), kind) for hint, kind in zip(hints, kinds, strict=True)
        )
        named = full.get("layer")
        owner = layer if layer is not None else named if isinstance(named, int) else self.layer
        node = Node(op, operands, outputs, full, owner, source or self.source)
        self.nodes.append(node)
        return node

    def emit(self, op: str, *inputs: Operand, name: str | None = None, **attrs: Any) -> Value:
        """`add` for an op with one result; returns that value."""
        node = self.add(op, inputs, attrs, names=() if name is None else (name,))
        if len(node.outputs) != 1:
            raise ProgramError(f"{op} has {len(node.outputs)} results; use add")
        return node.output

    def copy(self, node: Node, *, reinfer: bool = False) -> Node:
        """Append a node of another program, its replaced operands replaced; names are kept.

        With `reinfer` the result types are inferred anew, for operands that changed theirs; the
        new values then stand for the old ones.
        """
        inputs = tuple(self._resolve(operand) for operand in node.inputs)
        outputs = node.outputs
        if reinfer:
            types = tuple(self.operand_type(operand) for operand in inputs)
            kinds = get_op(node.op).infer(types, node.attrs)
            outputs = tuple(Value(v.name, k) for v, k in zip(node.outputs, kinds, strict=True))
            for old, new in zip(node.outputs, outputs, strict=True):
                if old != new:
                    self._replaced[old.name] = new
        if inputs != node.inputs or outputs != node.outputs:
            node = replace(node, inputs=inputs, outputs=outputs)
        self._names.update(value.name for value in outputs)
        self.nodes.append(node)
        return node

    def replace(self, old: Value, new: Operand) -> None:
        """From now on, whatever is copied or added reads `new` where it said `old`."""
        self._replaced[old.name] = new

    def _resolve(self, operand: Operand) -> Operand:
        while isinstance(operand, Value) and operand.name in self._replaced:
            following = self._replaced[operand.name]
            if following == operand:
                break
            if isinstance(following, Value) and following.name == operand.name:
                return following
            operand = following
        return operand

    def output(self, /, *values: Value, **named: Value) -> None:
        """Add results of the program, with names or without; one program has either kind."""
        self.outputs.extend((*values, *named.values()))
        self.output_names.extend(named)

    def build(self) -> Program:
        """The program; ProgramError where an output was replaced by something not a value."""
        outputs = []
        for value in self.outputs:
            final = self._resolve(value)
            if not isinstance(final, Value):
                raise ProgramError(f"the output {value} was replaced by {final}")
            outputs.append(final)
        return Program(
            self.name,
            dict(self.symbols),
            tuple(self.inputs),
            tuple(self.nodes),
            tuple(outputs),
            dict(self.weights),
            self.spec,
            self.phase,
            self.resources,
            dict(self.attrs),
            dict(self.loaders),
            tuple(self.output_names),
        )


def value_names(program: Program) -> set[str]:
    """Every value name of a program."""
    names = {value.name for value in program.inputs}
    return names | {value.name for node in program.nodes for value in node.outputs}


def remove_dead_code(program: Program, *, keep_weights: bool = False) -> Program:
    """Without nodes that nothing reads (but those with effects), and weights that nothing reads.

    The very same program comes back where nothing is dead.
    """
    live = {value.name for value in program.outputs}
    kept: list[Node] = []
    for node in reversed(program.nodes):
        if get_op(node.op).effects or any(value.name in live for value in node.outputs):
            kept.append(node)
            live.update(value.name for value in node.values())
    nodes = tuple(reversed(kept))
    read = {ref.name for node in nodes for ref in node.weights()}
    weights = {
        name: weight for name, weight in program.weights.items() if keep_weights or name in read
    }
    if len(nodes) == len(program.nodes) and len(weights) == len(program.weights):
        return program
    return program.with_nodes(nodes, weights=weights)
