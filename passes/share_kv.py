"""Lets layers read the keys and values of an earlier layer, for models that were trained to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import UsageError
from ..ir.ops.base import int_attr
from ..ir.program import Attr, Node, Program
from ..ir.types import TensorType
from .base import Pass, PassContext, PassResult, finish

NONE: Final = "none"
_GROUP: Final = re.compile(r"\d+(\+\d+)+")
_Kind = tuple[TensorType, TensorType, Attr]


@dataclass(frozen=True)
class ShareKv(Pass):
    """`attention(%q0, %k0, %v0) {layer = 0}; attention(%q1, %k1, %v1) {layer = 1}` =>
    `attention(%q0, %k0, %v0) {layer = 0}; attention(%q1, %k0, %v0) {layer = 1}`.

    With `factor`, so many layers of a kind, one behind the other, read what the first of them
    makes; or the layers of `groups`, "0+1 2+3+4". Cross-layer attention (Brandon et al. 2024,
    arXiv 2405.12981).

    Requires: nothing. Ensures: nothing more.
    Keeps: lossy: another model, whose weights have to be trained for it; its distance is reported.
    Why: the layers that share have no keys and values of their own to compute and to store.
    """

    factor: int = 1
    groups: str = NONE

    name: ClassVar[str] = "share-kv"
    phase: ClassVar[str] = "canonicalize"
    contract: ClassVar[str] = "lossy"
    tolerance: ClassVar[float] = math.inf

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewire the layers that share; UsageError for groups that are none."""
        attentions = {
            int_attr(node.attrs, "layer"): node for node in program.nodes if node.op == "attention"
        }
        first_of = {
            id(node): nodes[0]
            for nodes in self._shared(program, attentions)
            for node in nodes[1:]
            if node.inputs[1:3] != nodes[0].inputs[1:3]
        }
        if not first_of:
            return finish(program, program, 0)
        builder = ProgramBuilder.from_program(program)
        for node in program.nodes:
            if (first := first_of.get(id(node))) is not None:
                inputs = (node.inputs[0], *first.inputs[1:3], *node.inputs[3:])
                node = replace(node, inputs=inputs)
            builder.copy(node)
        return finish(program, remove_dead_code(builder.build()), len(first_of))

    def _shared(self, program: Program, attentions: dict[int, Node]) -> Iterator[list[Node]]:
        """The attention ops of each group, in order."""
        if self.factor < 1:
            raise UsageError(f"factor is {self.factor}, expected at least 1", where=self.name)
        if self.groups == NONE:
            yield from _by_kind(list(attentions.values()), self.factor)
            return
        if self.factor != 1:
            raise UsageError("both factor and groups are given", where=self.name)
        for layers in self._layers(max(program.spec.num_layers - 1, *attentions, 0)):
            # Where only some layers of a model are run, to compare them, the others are gone.
            nodes = [node for layer, node in attentions.items() if layer in layers]
            if len({_kind(node) for node in nodes}) > 1:
                raise UsageError(
                    f"layers {spell(layers)} differ in their keys and values or in their window",
                    where=self.name,
                    hint="only layers of one kind can share",
                )
            if nodes:
                yield nodes

    def _layers(self, last: int) -> Iterator[list[int]]:
        seen: set[int] = set()
        for text in self.groups.split():
            if not _GROUP.fullmatch(text):
                raise UsageError(
                    f"{text!r} is no group of layers",
                    where=self.name,
                    hint='write groups as "0+1 2+3+4"',
                )
            layers = sorted(int(layer) for layer in text.split("+"))
            for layer in layers:
                if layer in seen:
                    raise UsageError(f"layer {layer} is named twice", where=self.name)
                if layer > last:
                    raise UsageError(f"there is no layer {layer}", where=self.name)
                seen.add(layer)
            yield layers


def spell(layers: Sequence[int]) -> str:
    """A group as in the option: "0+1"."""
    return "+".join(map(str, layers))


def _by_kind(attentions: Sequence[Node], factor: int) -> Iterator[list[Node]]:
    kinds: dict[_Kind, list[Node]] = {}
    for node in attentions:
        kinds.setdefault(_kind(node), []).append(node)
    for nodes in kinds.values():
        for start in range(0, len(nodes), factor):
            yield nodes[start : start + factor]


def _kind(node: Node) -> _Kind:
    """What must be equal for two layers to read the same keys and values."""
    k, v = node.values()[1:3]
    return k.type, v.type, node.attrs["window"]
