"""Programs as `torch.fx` modules and back, for backends and tools that want that form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import ProgramError
from .ops import get_op
from .ops.base import AttrKind
from .program import Node, Operand, Program, Value, WeightLoader, WeightRef
from .shapes import parse_dim
from .types import Dim, Sym

if TYPE_CHECKING:
    import torch.fx

_META = "infc"
"""Key of `torch.fx.Node.meta` (and of the module's) under which our own value or node stands."""


def to_fx(program: Program, weights: WeightLoader) -> torch.fx.GraphModule:
    """A GraphModule with the program's inputs, in order, and its outputs as a tuple.

    Every node calls its op's meaning; weights become buffers of the module (all of them, so this
    is for models that fit). Ops on paged state cannot be expressed: ProgramError.
    """
    import torch

    root = torch.nn.Module()
    graph = torch.fx.Graph()
    made: dict[str, torch.fx.Node] = {}
    for value in program.inputs:
        made[value.name] = graph.placeholder(f"input_{len(made)}")
        made[value.name].meta[_META] = value
    fetched = {
        name: _fetch(graph, root, name, index, weights)
        for index, name in enumerate(program.weights)
    }
    sizes = _Sizes(graph, program, made)
    for node in program.nodes:
        _convert(graph, node, made, fetched, sizes)
    graph.output(tuple(made[value.name] for value in program.outputs))
    module = torch.fx.GraphModule(root, graph)
    module.meta[_META] = program
    return module


def _fetch(
    graph: torch.fx.Graph, root: torch.nn.Module, name: str, index: int, weights: WeightLoader
) -> torch.fx.Node:
    root.register_buffer(f"weight_{index}", weights(name))
    fetched = graph.get_attr(f"weight_{index}")
    fetched.meta[_META] = WeightRef(name)
    return fetched


class _Sizes:
    """Graph nodes for symbolic sizes, computed from the inputs' shapes where needed."""

    def __init__(
        self, graph: torch.fx.Graph, program: Program, made: Mapping[str, torch.fx.Node]
    ) -> None:
        self.graph = graph
        self.places: dict[str, tuple[torch.fx.Node, int, Sym]] = {}
        for value in program.inputs:
            for axis, dim in enumerate(value.type.shape):
                if isinstance(dim, Sym):
                    self.places.setdefault(dim.name, (made[value.name], axis, dim))

    def size(self, dim: Dim) -> Any:
        """A number, or the graph node that computes it."""
        import operator

        import torch

        if isinstance(dim, int):
            return dim
        if dim.name not in self.places:
            raise ProgramError(f"no input has the symbol {dim.name}")
        source, axis, known = self.places[dim.name]
        result = self.graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
        for function, amount, neutral in (
            (operator.sub, known.offset, 0),
            (operator.floordiv, known.scale, 1),
            (operator.mul, dim.scale, 1),
            (operator.add, dim.offset, 0),
        ):
            if amount != neutral:
                result = self.graph.call_function(function, (result, amount))
        return result


def _attributes(node: Node, sizes: _Sizes) -> dict[str, Any]:
    specs = get_op(node.op).attr_specs
    result: dict[str, Any] = {}
    for name, value in node.attrs.items():
        kind = specs[name].kind
        if isinstance(value, str) and kind in (AttrKind.DIM, AttrKind.OFFSET):
            result[name] = sizes.size(parse_dim(value))
        elif isinstance(value, tuple) and kind is AttrKind.DIMS:
            result[name] = tuple(
                sizes.size(parse_dim(v)) for v in value if isinstance(v, (int, str))
            )
        else:
            result[name] = value
    return result


def _convert(
    graph: torch.fx.Graph,
    node: Node,
    made: dict[str, torch.fx.Node],
    fetched: Mapping[str, torch.fx.Node],
    sizes: _Sizes,
) -> None:
    import operator

    op = get_op(node.op)
    if op.effects:
        raise ProgramError(f"{node.op} works on paged state, which torch.fx cannot represent")

    def operand(item: Operand) -> Any:
        if isinstance(item, Value):
            return made[item.name]
        return fetched[item.name] if isinstance(item, WeightRef) else item

    args = tuple(operand(item) for item in node.inputs)
    call = graph.call_function(op.meaning, args, _attributes(node, sizes))
    call.meta[_META] = node
    if len(node.outputs) == 1:
        made[node.output.name] = call
        return
    for index, value in enumerate(node.outputs):
        made[value.name] = graph.call_function(operator.getitem, (call, index))
        made[value.name].meta[_META] = value


def from_fx(module: torch.fx.GraphModule) -> Program:
    """The program of a module that `to_fx` made, as its graph stands now.

    Nodes may have been erased, reordered, or had their operands changed; a node that `to_fx` did
    not make is a ProgramError. Types are those that were declared: verify what comes back.
    """
    original = module.meta.get(_META)
    if not isinstance(original, Program):
        raise ProgramError("this module was not made by to_fx")
    values: dict[torch.fx.Node, Operand] = {}
    inputs: list[Value] = []
    nodes: list[Node] = []
    outputs: tuple[Value, ...] = ()
    for item in module.graph.nodes:
        known = item.meta.get(_META)
        if item.op == "output":
            outputs = tuple(_value(values, arg) for arg in item.args[0])
        elif isinstance(known, Node):
            read = tuple(values.get(arg, arg) for arg in item.args)
            nodes.append(replace(known, inputs=read))
            if len(known.outputs) == 1:
                values[item] = known.output
        elif isinstance(known, (Value, WeightRef)):
            values[item] = known
            if item.op == "placeholder" and isinstance(known, Value):
                inputs.append(known)
        elif not _computes_size(item):
            raise ProgramError(f"the graph node {item.name} was not created by infc")
    return replace(original, inputs=tuple(inputs), nodes=tuple(nodes), outputs=outputs)


def _value(values: Mapping[torch.fx.Node, Operand], item: Any) -> Value:
    found = values.get(item)
    if not isinstance(found, Value):
        raise ProgramError(f"the output {item} is not a value of the program")
    return found


def _computes_size(item: torch.fx.Node) -> bool:
    """True for the arithmetic on sizes that `to_fx` adds: no tensor comes out of it."""
    import operator

    import torch

    known = (
        torch.ops.aten.sym_size.int,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
    )
    return item.op == "call_function" and item.target in known
