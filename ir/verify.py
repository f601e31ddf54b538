"""What must hold of a program in its phase; ProgramError names the node that breaks it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ProgramError
from .interpret import describe
from .ops import PHASES, get_op
from .ops.base import OperandType
from .ops.state import cache_of
from .program import Node, Operand, Program, Value, WeightRef
from .resources import Resource
from .types import Dim, Sym, TensorType
from .weights import infer_weight


def verify(program: Program) -> None:
    """ProgramError unless the program is well formed and legal in its phase.

    Checked: unique names, definition before use, ops known and legal in the phase, attributes
    complete and valid, declared types equal to inferred ones, weights declared and of the type
    their expressions give, symbols declared, outputs defined and named apart, and resources
    covering every cache, each of which one node writes before others read it, and which keeps what
    they see.
    """
    if program.phase not in PHASES:
        raise ProgramError(f"unknown phase {program.phase!r}", where=program.name)
    _check_weights(program)
    caches = _check_resources(program)
    defined: dict[str, Value] = {}
    for value in program.inputs:
        _define(program, value, defined, "the inputs")
    for node in program.nodes:
        _check_node(program, node, defined)
        if get_op(node.op).effects:
            caches.check(node)
        for value in node.outputs:
            _define(program, value, defined, describe(node))
    for value in program.outputs:
        if defined.get(value.name) != value:
            raise ProgramError(f"the output {value} is not defined", where=program.name)
    _check_output_names(program)


def _check_output_names(program: Program) -> None:
    names = program.output_names
    if names and len(names) != len(program.outputs):
        count = f"{len(program.outputs)} outputs have {len(names)} names"
        raise ProgramError(count, where=program.name, hint="name all of them, or none")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ProgramError(f"two outputs have the name {twice}", where=program.name)


def _define(program: Program, value: Value, defined: dict[str, Value], where: str) -> None:
    if value.name in defined:
        raise ProgramError(f"{value} is defined twice", where=where)
    _check_symbols(program, value.type, where)
    defined[value.name] = value


def _check_symbols(program: Program, kind: TensorType, where: str) -> None:
    for dim in kind.shape:
        _check_dim(program, dim, kind, where)


def _check_dim(program: Program, dim: Dim, kind: TensorType, where: str) -> None:
    if not isinstance(dim, Sym):
        if dim < 0:
            raise ProgramError(f"{kind} has a negative dimension", where=where)
        return
    bounds = program.symbols.get(dim.name)
    if bounds is None:
        raise ProgramError(f"the symbol {dim.name} of {kind} is not declared", where=where)
    if dim.scale < 1 or dim.scale * bounds.low + dim.offset < 0:
        raise ProgramError(f"{dim} of {kind} can be negative", where=where)


def _check_weights(program: Program) -> None:
    for name, weight in program.weights.items():
        where = f"@{name}"
        if weight.name != name:
            raise ProgramError(f"is in the table under the name {name}", where=f"@{weight.name}")
        if any(not isinstance(dim, int) or dim < 0 for dim in weight.type.shape):
            raise ProgramError(
                f"the shape of a weight must be constant: {weight.type}", where=where
            )
        try:
            kind = infer_weight(weight.expr)
        except ProgramError as error:
            raise ProgramError(str(error), where=where) from None
        if kind is not None and kind != weight.type:
            raise ProgramError(f"is declared {weight.type}, its expression is {kind}", where=where)


@dataclass(slots=True)
class _Caches:
    """What state ops may read and write, and what the nodes so far have written."""

    resources: dict[str, Resource]
    written: set[int] = field(default_factory=set)

    def check(self, node: Node) -> None:
        """ProgramError where the node reads what is not there, or writes what another has."""
        op, cache, where = get_op(node.op), cache_of(node.attrs), describe(node)
        group = self.resources.get(str(node.attrs["group"]))
        if group is None or cache not in group.layers:
            name = node.attrs["group"]
            raise ProgramError(f"resource {name} has no cache of layer {cache}", where=where)
        if op.stores:
            if cache in self.written:
                raise ProgramError(f"the cache of layer {cache} is written twice", where=where)
            self.written.add(cache)
        elif cache not in self.written:
            message = f"reads the cache of layer {cache}, which no node before it writes"
            raise ProgramError(message, where=where)
        window = node.attrs.get("window", group.reach)
        if group.reach is not None and (not isinstance(window, int) or window > group.reach):
            seen = "all positions" if window is None else f"{window} positions"
            message = f"sees {seen}, of which resource {group.name} keeps {group.reach}"
            raise ProgramError(message, where=where)


def _check_resources(program: Program) -> _Caches:
    names = [group.name for group in program.resources]
    if len(set(names)) != len(names):
        raise ProgramError("two resources have the same name", where=program.name)
    owners: dict[int, str] = {}
    for group in program.resources:
        for layer in group.layers:
            if owners.setdefault(layer, group.name) != group.name:
                where = f"resource {group.name}"
                raise ProgramError(f"layer {layer} is also in {owners[layer]}", where=where)
    return _Caches(dict(zip(names, program.resources, strict=True)))


def _operand_type(program: Program, operand: Operand, defined: dict[str, Value]) -> OperandType:
    if isinstance(operand, Value):
        if operand.name not in defined:
            raise ProgramError(f"{operand} is used before it is defined")
        if defined[operand.name] != operand:
            raise ProgramError(
                f"{operand} is read as {operand.type}, defined {defined[operand.name].type}"
            )
        return operand.type
    if isinstance(operand, WeightRef):
        if operand.name not in program.weights:
            raise ProgramError(f"the weight {operand} is not declared")
        return program.weights[operand.name].type
    return operand


def _check_node(program: Program, node: Node, defined: dict[str, Value]) -> None:
    try:
        op = get_op(node.op)
        if program.phase not in op.phases:
            raise ProgramError(f"{node.op} is not legal in phase {program.phase}")
        types = [_operand_type(program, operand, defined) for operand in node.inputs]
        inferred = op.infer(types, node.attrs)
        full = op.complete(node.attrs, types)
        if dict(node.attrs) != full:
            left_out = [name for name in full if name not in node.attrs]
            what = f"lack {', '.join(left_out)}" if left_out else f"are not in stored form, {full}"
            raise ProgramError(f"attributes {what}", hint="build nodes with ProgramBuilder")
        if tuple(value.type for value in node.outputs) != inferred:
            declared = ", ".join(str(value.type) for value in node.outputs)
            wanted = ", ".join(str(kind) for kind in inferred)
            raise ProgramError(f"declared ({declared}), inferred ({wanted})")
    except ProgramError as error:
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        raise ProgramError(message, where=describe(node)) from None
