"""Removes the leading dimension of size 1 that models carry through every value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.ops import Kind, get_op
from ..ir.program import Node, Operand, Program, Value, WeightRef
from ..ir.shapes import spell_dim
from ..ir.types import TensorType
from .base import Pass, PassContext, PassResult, finish

MAX_ROUNDS = 8


@dataclass(frozen=True)
class SqueezeUnitBatch(Pass):
    """`%y = linear(%x, @w) : f32[1, T, 64]` => `%y = linear(%x, @w) : f32[T, 64]`.

    Requires: nothing. Ensures: unit-batch-squeezed (token values are `[T, ..]`).
    Keeps: every bit; only shapes change.
    Why: later patterns and kernels handle one layout, with tokens first.
    """

    name: ClassVar[str] = "squeeze-unit-batch"
    phase: ClassVar[str] = "canonicalize"
    ensures: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Squeeze until no value with a leading 1 can lose it."""
        current, matches = program, 0
        for _ in range(MAX_ROUNDS):
            squeezer = _Squeezer(ProgramBuilder.from_program(current))
            for node in current.nodes:
                squeezer.visit(node)
            squeezed = remove_dead_code(squeezer.build(current))
            if squeezed.nodes == current.nodes:
                break
            matches += squeezer.count
            current = squeezed
        return finish(program, current, matches)


@dataclass(slots=True)
class _Squeezer:
    """One walk; `small` maps a value's name to what holds it without its leading 1."""

    builder: ProgramBuilder
    small: dict[str, Value] = field(default_factory=dict)
    whole: dict[str, Value] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    count: int = 0

    def visit(self, node: Node) -> None:
        """Copy the node without its unit dimension, or as it is."""
        if node.op == "reshape":
            self._reshape(node)
            return
        kind = get_op(node.op).kind
        outs = [_squeezable(value) for value in node.outputs]
        if kind is Kind.POINTWISE and not outs[0]:
            self._emit(node, [self._dropped(v) for v in node.inputs], dict(node.attrs), False)
            return
        attrs = _attrs_without_first(node) if outs and all(outs) else None
        if attrs is None:
            self.builder.copy(_with_inputs(node, [self._full(v) for v in node.inputs]))
            return
        inputs = [self._input(node, v) for v in node.inputs]
        self._emit(node, inputs, attrs, True)

    def _input(self, node: Node, operand: Operand) -> Operand:
        """The operand as the squeezed node reads it."""
        if get_op(node.op).kind is Kind.POINTWISE:
            return self._dropped(operand)
        if not isinstance(operand, Value):
            return operand
        if node.op in ("expand", "matmul") and operand.type.rank < node.output.type.rank:
            return self._full(operand)
        if operand.type.rank and _squeezable(operand):
            return self._dropped(operand)
        return self._full(operand)

    def _emit(
        self, node: Node, inputs: list[Operand], attrs: dict[str, Any], squeezed: bool
    ) -> None:
        types = tuple(self.builder.operand_type(v) for v in inputs)
        op = get_op(node.op)
        full = op.complete(attrs, types)
        kinds = op.infer(types, full)
        outputs = tuple(Value(v.name, k) for v, k in zip(node.outputs, kinds, strict=True))
        self.builder.copy(replace(node, inputs=tuple(inputs), outputs=outputs, attrs=full))
        if squeezed:
            self.count += 1
            self.taken.update(value.name for value in outputs)
            self.small.update((value.name, value) for value in outputs)

    def _reshape(self, node: Node) -> None:
        source = node.inputs[0]
        source = self.small.get(source.name, source) if isinstance(source, Value) else source
        out = node.output
        shape = out.type.shape[1:] if _squeezable(out) else out.type.shape
        kind = self.builder.operand_type(source)
        if _squeezable(out):
            if isinstance(source, Value) and isinstance(kind, TensorType) and kind.shape == shape:
                self.small[out.name] = source
                return
            self._emit(node, [source], {"shape": tuple(map(spell_dim, shape))}, True)
        else:
            self._emit(node, [source], dict(node.attrs), False)

    def _dropped(self, operand: Operand) -> Operand:
        """The operand without its leading 1 (as it is where it has none)."""
        if isinstance(operand, WeightRef):
            kind = self.builder.weights[operand.name].type
            if kind.rank < 2 or kind.shape[0] != 1:
                return operand
            shape = tuple(map(spell_dim, kind.shape[1:]))
            return self.builder.emit(
                "reshape", operand, name=f"{operand.name}.squeezed", shape=shape
            )
        if not isinstance(operand, Value) or not _squeezable(operand):
            return operand
        if operand.name not in self.small:
            shape = tuple(map(spell_dim, operand.type.shape[1:]))
            value = self.builder.emit(
                "reshape", operand, name=f"{operand.name}.squeezed", shape=shape
            )
            self.small[operand.name] = value
        return self.small[operand.name]

    def _full(self, operand: Operand) -> Operand:
        """The operand with the shape that it had."""
        if not isinstance(operand, Value) or operand.name not in self.small:
            return operand
        if operand in self.builder.inputs or self.small[operand.name].name.endswith(".squeezed"):
            return operand
        if operand.name not in self.whole:
            name = f"{operand.name}.batched" if operand.name in self.taken else operand.name
            shape = tuple(map(spell_dim, operand.type.shape))
            value = self.builder.emit("reshape", self.small[operand.name], name=name, shape=shape)
            if name == operand.name:
                value = _rename_last(self.builder, value, operand)
            self.whole[operand.name] = value
        return self.whole[operand.name]

    def build(self, program: Program) -> Program:
        """The program; its outputs keep their shapes."""
        outputs = []
        for value in program.outputs:
            final = self._full(value)
            assert isinstance(final, Value)
            outputs.append(final)
        self.builder.outputs = outputs
        return self.builder.build()


def _rename_last(builder: ProgramBuilder, value: Value, wanted: Value) -> Value:
    """Give the value just made the name `wanted`, which no other node has any more."""
    renamed = Value(wanted.name, value.type)
    builder.nodes[-1] = replace(builder.nodes[-1], outputs=(renamed,))
    return renamed


def _squeezable(value: Value) -> bool:
    return value.type.rank >= 2 and value.type.shape[0] == 1


def _with_inputs(node: Node, inputs: list[Operand]) -> Node:
    return replace(node, inputs=tuple(inputs))


def _attrs_without_first(node: Node) -> dict[str, Any] | None:
    """The node's attributes where every dimension moves up by one; None: it needs its first."""
    attrs: dict[str, Any] = dict(node.attrs)
    kind = get_op(node.op).kind
    first = node.inputs[0] if node.inputs else None
    if node.op in ("full", "expand"):
        attrs["shape"] = attrs["shape"][1:]
        return attrs
    if kind is Kind.POINTWISE or node.op == "embedding":
        return attrs
    if not isinstance(first, Value) or not _squeezable(first):
        return None
    if node.op in ("linear", "matmul"):
        others = [v for v in node.inputs[1:] if isinstance(v, Value)]
        deep = first.type.rank >= 3 and all(v.type.rank >= 3 or v.type.rank == 2 for v in others)
        return attrs if deep else None
    if node.op == "transpose":
        perm = attrs["perm"]
        return {"perm": tuple(p - 1 for p in perm[1:])} if perm[0] == 0 else None
    if kind is Kind.NORM or node.op in ("gated_act", "topk"):
        return attrs
    if "dims" in attrs and 0 not in attrs["dims"]:
        return attrs | {"dims": tuple(d - 1 for d in attrs["dims"])}
    if isinstance(attrs.get("dim"), int) and attrs["dim"] != 0:
        return attrs | {"dim": attrs["dim"] - 1}
    return None
