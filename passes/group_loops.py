"""Groups pointwise ops and row reductions that nothing claimed into loops over rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..ir.ops import get_op
from ..ir.ops.base import Kind
from ..ir.plan import loop_groups
from ..ir.program import Node, Program
from ..ir.types import Dim
from .base import Pass, PassContext, PassResult, finish

ROW_REDUCTIONS = frozenset({"sum", "mean", "amax"})


@dataclass(frozen=True)
class GroupLoops(Pass):
    """`%a = mul(..); %m = mean(%a); %b = mul(%x, %m)` => one loop over rows, in `attr loops`.

    Requires: the order of nodes is final.
    Ensures: a group's results share their leading dimensions; their last is one width, or 1.
    Keeps: every bit; only how a backend walks memory changes.
    Why: intermediate results within a group stay in the L1 cache.
    """

    name: ClassVar[str] = "group-loops"
    phase: ClassVar[str] = "plan"
    requires: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """The program with `attrs["loops"]`: the result names of each group of two or more."""
        groups = _find_groups(program)
        loops = tuple(tuple(node.output.name for node in group) for group in groups)
        if not loops or program.attrs.get("loops") == loops:
            return PassResult(program)
        changed = replace(program, attrs={**program.attrs, "loops": loops})
        return finish(program, changed, len(loops))


def loop_times(program: Program) -> list[int]:
    """When each node runs: its index, or for a member of a group that of the group's last node.

    A group reads what it needs and writes what it makes row by row: nothing it reads may die, and
    nothing it writes may share memory with it, from its first node to its last.
    """
    times = list(range(len(program.nodes)))
    index = {node.outputs[0].name: i for i, node in enumerate(program.nodes) if node.outputs}
    for group in loop_groups(program):
        members = [index[name] for name in group]
        for member in members:
            times[member] = max(members)
    return times


@dataclass(slots=True)
class _Group:
    """The group that is being grown."""

    nodes: list[Node] = field(default_factory=list)
    lead: tuple[Dim, ...] = ()
    width: Dim = 1
    members: set[str] = field(default_factory=set)

    def accepts(self, node: Node) -> bool:
        lead, width = _rows(node)
        if not self.nodes:
            return True
        return lead == self.lead and (width in (1, self.width) or self.width == 1)

    def add(self, node: Node) -> None:
        lead, width = _rows(node)
        self.lead = lead
        self.width = width if self.width == 1 else self.width
        self.nodes.append(node)
        self.members.add(node.output.name)


def _find_groups(program: Program) -> list[list[Node]]:
    groups: list[list[Node]] = []
    group = _Group()
    for node in program.nodes:
        if _is_loop(node) and group.accepts(node):
            group.add(node)
            continue
        # A view of an older value does not stand in the way; everything else ends the group.
        if _is_view(node) and group.members.isdisjoint(v.name for v in node.values()):
            continue
        groups.append(group.nodes)
        group = _Group()
        if _is_loop(node):
            group.add(node)
    groups.append(group.nodes)
    return [nodes for nodes in groups if len(nodes) > 1]


def _is_loop(node: Node) -> bool:
    if get_op(node.op).kind is Kind.POINTWISE:
        return True
    if node.op not in ROW_REDUCTIONS:
        return False
    (source,) = node.values()
    return node.attrs["dims"] == (source.type.rank - 1,) and node.attrs["keepdim"] is True


def _is_view(node: Node) -> bool:
    return get_op(node.op).kind is Kind.VIEW and node.op != "concat"


def _rows(node: Node) -> tuple[tuple[Dim, ...], Dim]:
    """The leading dimensions of a loop's result, and its width."""
    shape = node.output.type.shape or (1,)
    return shape[:-1], shape[-1]
