"""Fuses a residual addition into the norm behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.builder import ProgramBuilder
from ..ir.program import Node, Program, Value
from .base import Pass, PassContext, PassResult, finish
from .near_miss import NearMiss


@dataclass(frozen=True)
class FuseAddNorm(Pass):
    """`%s = add(%r, %x); %n = rms_norm(%s, @w)` => `%n, %s = add_rms_norm(%x, %r, @w)`.

    Requires: norms-fused. Ensures: add-norms-fused. (`layer_norm` likewise.)
    Keeps: every bit: the sum is rounded before the norm, as it was.
    Why: the residual stream is read and written once a norm instead of twice.
    """

    name: ClassVar[str] = "fuse-add-norm"
    phase: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"norms-fused"})
    ensures: ClassVar[frozenset[str]] = frozenset({"add-norms-fused"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse each addition into the first norm that reads it."""
        position = {v.name: i for i, n in enumerate(program.nodes) for v in n.outputs}
        norms, misses = _first_norms(program)
        if not norms:
            return finish(program, program, 0, tuple(misses))
        builder = ProgramBuilder.from_program(program)
        fused = {id(norm) for norm in norms.values()}
        for node in program.nodes:
            norm = norms.get(id(node))
            if norm is not None:
                builder.copy(_fused(node, norm, position))
            elif id(node) not in fused:
                builder.copy(node)
        return finish(program, builder.build(), len(norms), tuple(misses))


def _first_norms(program: Program) -> tuple[dict[int, Node], list[NearMiss]]:
    """id(addition) -> the norm to fuse with it, and the norms of sums that cannot be."""
    producers = program.producers()
    chosen: dict[int, Node] = {}
    misses = []
    for node in program.nodes:
        if node.op not in ("rms_norm", "layer_norm"):
            continue
        total = node.inputs[0]
        added = producers.get(total.name) if isinstance(total, Value) else None
        if added is None or added.op != "add" or id(added) in chosen:
            continue
        if any(isinstance(operand, Value) for operand in node.inputs[1:]):
            misses.append(NearMiss.at(node, "its weight is computed, perhaps after the sum"))
            continue
        same = [v for v in added.values() if v.type == added.output.type]
        if len(same) == 2 and all(isinstance(v, Value) for v in added.inputs):
            chosen[id(added)] = node
        else:
            misses.append(NearMiss.at(node, "its input is not a sum of two equally shaped values"))
    return chosen, misses


def _fused(added: Node, norm: Node, position: dict[str, int]) -> Node:
    """The fused node; the operand made later is x, the older one the residual."""
    a, b = added.values()
    later, older = (a, b) if position.get(a.name, -1) > position.get(b.name, -1) else (b, a)
    return replace(
        norm,
        op=f"add_{norm.op}",
        inputs=(later, older, *norm.inputs[1:]),
        outputs=(norm.output, added.output),
    )
