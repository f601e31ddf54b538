"""Makes one matrix product of several that read the same input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.program import Node, Operand, Program, Value, WeightExpr, WeightRef
from ..ir.schemes import get_scheme
from ..ir.types import TensorType
from .base import Pass, PassContext, PassResult, finish
from .cache_readers import cache_readers
from .near_miss import NearMiss


@dataclass(frozen=True)
class MergeQkv(Pass):
    """`%q = linear(%x, @q); %k = linear(%x, @k); %v = linear(%x, @v)` =>
    `%m = linear(%x, @q_k_v); %q = slice(%m) ...; %k = slice(%m) ...; %v = slice(%m) ...`.

    Where queries have another scheme, keys and values are merged alone.

    Requires: unit-batch-squeezed. Ensures: nothing more (a checkpoint may have it merged).
    Keeps: every bit: each element is the same sum in the same order.
    Why: the input is read once with a single product; the slices are strided views.
    """

    name: ClassVar[str] = "merge-qkv"
    phase: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Merge the projections of each attention that share their input."""
        producers = program.producers()
        groups: list[list[Node]] = []
        for node, *_ in cache_readers(program):  # the others have only a query of their own
            found = [_projection(producers, operand) for operand in node.inputs[:3]]
            group = [one for one in found if one is not None]
            if len(group) == len({id(one) for one in group}) == 3:
                is_alone = _scheme(group[0]) != _scheme(group[1]) == _scheme(group[2])
                groups.append(group[1:] if is_alone else group)
        return _merge(program, groups)


@dataclass(frozen=True)
class MergeGateUp(Pass):
    """`mul(silu(linear(%x, @gate)), linear(%x, @up))` =>
    `%m = linear(%x, @gate_up); mul(silu(slice(%m) ...), slice(%m) ...)`.

    Requires: unit-batch-squeezed. Ensures: nothing more (a checkpoint may have it merged).
    Keeps: every bit: each element is the same sum in the same order.
    Why: the input is read once, and each gate is next to the value that it gates.
    """

    name: ClassVar[str] = "merge-gate-up"
    phase: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Merge the two projections of each gated feed-forward layer, gate first."""
        producers = program.producers()
        groups: list[list[Node]] = []
        for node in program.nodes:
            if node.op == "mul":
                groups.extend(_gate_and_up(node, producers))
        return _merge(program, groups)


PRODUCTS = {"linear": 1, "scaled_linear": 2, "decoded_linear": 1}
"""Products by a matrix of the model, and how many of their operands are the activation."""
_BETWEEN = frozenset({"reshape", "transpose", "rope", "rms_norm", "layer_norm", "cast", "clamp"})
"""Ops that may stand between a projection and the attention that it feeds."""
ACTIVATIONS = frozenset({"silu", "gelu", "relu", "sigmoid", "tanh"})
"""Ops that may stand between a gate's projection and the product."""


def _scheme(node: Node) -> object:
    """What a product holds its matrix in; None for one that is not quantized."""
    return node.attrs.get("scheme")


def _projection(producers: dict[str, Node], operand: Operand) -> Node | None:
    """The linear behind an operand of attention; None where something else is."""
    while isinstance(operand, Value):
        node = producers.get(operand.name)
        if node is None or node.op in PRODUCTS:
            return node
        scaled = node.op in ("mul", "div") and not isinstance(node.inputs[1], Value)
        if node.op not in _BETWEEN and not scaled:
            return None
        operand = node.inputs[0]
    return None


def _gate_and_up(node: Node, producers: dict[str, Node]) -> Iterator[list[Node]]:
    for gated, other in (node.inputs, node.inputs[::-1]):
        if not isinstance(gated, Value) or not isinstance(other, Value):
            continue
        act, up = producers.get(gated.name), producers.get(other.name)
        if act is None or up is None or act.op not in ACTIVATIONS or up.op not in PRODUCTS:
            continue
        source = act.inputs[0]
        gate = producers.get(source.name) if isinstance(source, Value) else None
        if gate is not None and gate.op in PRODUCTS and gate is not up:
            yield [gate, up]
            return


def _merge(program: Program, groups: Sequence[Sequence[Node]]) -> PassResult:
    """Merge each group where its linears allow it; the reasons for the others are near misses."""
    misses: list[NearMiss] = []
    first_of: dict[int, Sequence[Node]] = {}
    members: set[int] = set()
    order = {id(node): i for i, node in enumerate(program.nodes)}
    for group in groups:
        reason = _obstacle(program, group)
        if reason is None and any(id(node) in members for node in group):
            reason = "is merged already"
        if reason is not None:
            misses.append(NearMiss.at(group[0], reason))
            continue
        members.update(id(node) for node in group)
        first_of[min((id(node) for node in group), key=order.__getitem__)] = group
    builder = ProgramBuilder.from_program(program)
    for node in program.nodes:
        if id(node) in first_of:
            _emit_merged(builder, first_of[id(node)])
        elif id(node) not in members:
            builder.copy(node)
    merged = remove_dead_code(builder.build())
    return finish(program, merged, len(first_of), tuple(misses))


def _obstacle(program: Program, group: Sequence[Node]) -> str | None:
    """Why these linears cannot be one."""
    if len({node.op for node in group}) != 1:
        return "only some of the projections are quantized"
    given = PRODUCTS[group[0].op]
    if len({node.inputs[:given] for node in group}) != 1:
        return "the projections read different inputs"
    if len({len(node.inputs) for node in group}) != 1:
        return "only some of the projections have a bias"
    if len({tuple(node.attrs.items()) for node in group}) != 1:
        return "the projections have different schemes"
    if any(not isinstance(operand, WeightRef) for node in group for operand in node.inputs[given:]):
        return "a projection's matrix is computed"
    types = [program.operand_type(node.inputs[given]) for node in group]
    if len({kind.dtype for kind in types if isinstance(kind, TensorType)}) != 1:
        return "the projections have different element types"
    return _tile_obstacle(group)


def _tile_obstacle(group: Sequence[Node]) -> str | None:
    """Why matrices with scales of tiles cannot lie one under the other; None where they can."""
    if "scheme" not in group[0].attrs:
        return None
    tile = get_scheme(group[0].attrs["scheme"]).weight.tile
    for node in group[:-1] if tile else ():
        rows = node.output.type.shape[-1]
        if not isinstance(rows, int) or rows % tile:
            return f"a matrix has {rows} rows, no multiple of the {tile} that share scales"
    return None


def _emit_merged(builder: ProgramBuilder, group: Sequence[Node]) -> None:
    first = group[0]
    given = PRODUCTS[first.op]
    operands: list[Operand] = list(first.inputs[:given])
    for place in range(given, len(first.inputs)):
        refs = [node.inputs[place] for node in group]
        operands.append(_concat(builder, [ref for ref in refs if isinstance(ref, WeightRef)]))
    hint = f"{first.output.name}.merged"
    merged = builder.add(
        first.op, operands, dict(first.attrs), names=(hint,), layer=first.layer, source=first.source
    )
    rank, start = merged.output.type.rank, 0
    for node in group:
        size: Any = node.output.type.shape[-1]
        attrs = {"dim": rank - 1, "start": start, "stop": start + size}
        part = builder.add(
            "slice",
            (merged.output,),
            attrs,
            names=(f"{node.output.name}.part",),
            layer=node.layer,
            source=node.source,
        )
        start += size
        _adopt(builder, part, node.output)


def _adopt(builder: ProgramBuilder, part: Node, old: Value) -> None:
    """Let the slice just added have the name of the value that it stands for."""
    from .match import adopt_name

    adopt_name(builder, len(builder.nodes) - 1, old, part.output)


def _concat(builder: ProgramBuilder, refs: Sequence[WeightRef]) -> WeightRef:
    """The weights one under the other, as one entry of the table."""
    weights = [builder.weights[ref.name] for ref in refs]
    rows: Any = sum(weight.type.shape[0] for weight in weights)
    kind = TensorType(weights[0].type.dtype, (rows, *weights[0].type.shape[1:]))
    expr = WeightExpr("concat", tuple(weight.expr for weight in weights), {"dim": 0})
    name = _joined_name([ref.name for ref in refs])
    known = builder.weights.get(name)
    if known is not None and known.expr != expr:
        name = builder.fresh_weight_name(name)
    return builder.weight(name, kind, expr)


def _joined_name(names: Sequence[str]) -> str:
    """`a.q.weight`, `a.k.weight` => `a.q_k.weight`; another form where they differ more."""
    parts = [name.split(".") for name in names]
    if len({len(one) for one in parts}) == 1:
        differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(differing) == 1:
            joined = list(parts[0])
            joined[differing[0]] = "_".join(one[differing[0]] for one in parts)
            return ".".join(joined)
    return f"{names[0]}.merged"
