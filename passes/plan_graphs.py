"""Plans which steps a device replays as captured graphs, and where such graphs are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from ..ir.errors import PassError
from ..ir.interpret import describe
from ..ir.ops import get_op
from ..ir.plan import loop_groups, planned_arena
from ..ir.program import Attr, Node, Program
from .base import Pass, PassContext, PassResult, finish
from .plan_memory import PLANNED, is_view

GRAPHS_PLANNED = "graphs-planned"

_COARSEST = 8
"""Sizes double up to this one, and grow by at least as much from there on."""
_PARTS_OF_BUCKETS, _PARTS_OF_PIECES = 32, 4
"""Into how many sizes the range between two powers of two is divided: what pads a step of one query
each is launched for nothing; larger pieces share their weights, and there is one for each layer."""
_ROWS = frozenset({"T", "R"})
"""Sizes that padding can fill: rows beside those of the step change nothing."""


@dataclass(frozen=True)
class PlanGraphs(Pass):
    """`program {...}` => `program { attr {graph_buckets = (1, 2, 4), graph_cuts = ("7",), ...} }`.

    Requires: planned. Ensures: graphs-planned: no loop group has nodes on both sides of a cut, and
    what is read behind one has a place in the arena.
    Keeps: every bit. Options: the most sequences and the most tokens of captured steps, 0 for none.
    Why: a captured graph is launched at once, where the host launches kernels one after the other.
    """

    sequences: int = 256
    tokens: int = 512

    name: ClassVar[str] = "plan-graphs"
    phase: ClassVar[str] = "plan"
    requires: ClassVar[frozenset[str]] = frozenset({PLANNED})
    # Places in memory stay as they are: this may come behind the pass that chose them.
    ensures: ClassVar[frozenset[str]] = frozenset({GRAPHS_PLANNED, PLANNED})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Plan, and write `graph_buckets`, `_pieces`, `_cuts` and `_inputs` into the attributes."""
        cuts = tuple(node for node in program.nodes if _cuts(node))
        _check_groups(program, cuts)
        _check_places(program, cuts)
        bounds = {name: bound.high for name, bound in program.symbols.items()}
        most = bounds.get("T", 0) if bounds.keys() <= _ROWS else 0
        rows = min(most, bounds.get("R", most))
        planned: dict[str, Attr] = {
            "graph_buckets": ladder(min(rows, self.sequences), _PARTS_OF_BUCKETS),
            "graph_pieces": ladder(min(most, self.tokens), _PARTS_OF_PIECES, _COARSEST),
            "graph_cuts": tuple(node.output.name for node in cuts),
            "graph_inputs": _inputs(program, cuts),
        }
        if not most or all(program.attrs.get(name) == value for name, value in planned.items()):
            return PassResult(program)
        changed = replace(program, attrs={**program.attrs, **planned})
        return finish(program, changed, 1 + len(cuts))


def ladder(most: int, parts: int, least: int = 1) -> tuple[int, ...]:
    """Sizes from `least` to `most`, which is the last: 1, 2, 4, 8, 16, 24, 32, ..."""
    sizes, size = [], least
    while size < most:
        sizes.append(size)
        whole = 1 << (size.bit_length() - 1)
        size += min(size, max(_COARSEST, whole // parts))
    return (*sizes, most) if most > 0 else ()


def _cuts(node: Node) -> bool:
    """Whether a node's work depends on more than how many tokens a step has."""
    return get_op(node.op).mixer and bool(node.outputs)


def _check_groups(program: Program, cuts: tuple[Node, ...]) -> None:
    """PassError for a loop group on both sides of a cut: it is one launch."""
    if not cuts:
        return
    flags = [node in cuts for node in program.nodes]
    pieces = list(accumulate(map(int, flags)))
    piece_of = {
        node.outputs[0].name: (piece, flag)
        for node, piece, flag in zip(program.nodes, pieces, flags, strict=True)
        if node.outputs
    }
    for group in loop_groups(program):
        places = {piece_of[name] for name in group}
        if len(places) > 1:
            raise PassError(
                f"the loop group of {', '.join('%' + name for name in group)} crosses an attention"
                " node, where captured graphs are cut",
                where=program.name,
                hint="run group-loops on nodes that nothing but row-wise ops lies between",
            )


def _check_places(program: Program, cuts: tuple[Node, ...]) -> None:
    """PassError for a value that is read behind a cut, and has no place that outlives its graph."""
    offsets = planned_arena(program).offsets
    if not offsets:
        return
    owner: dict[str, str] = {}
    made: dict[str, int] = {}
    piece = 0
    for node in program.nodes:
        piece += node in cuts
        read = {owner.get(value.name, value.name) for value in node.values()}
        for name in sorted(read - offsets.keys()):
            if made.get(name, piece) != piece:
                raise PassError(
                    f"%{name} is read by {describe(node)}, behind a cut of captured graphs, and has"
                    " no place in the arena",
                    where=program.name,
                    hint="run plan-memory again, as the last pass but this",
                )
        if is_view(node.op) and node.values():
            source = node.values()[0].name
            owner[node.output.name] = owner.get(source, source)
        else:
            made.update((value.name, piece) for value in node.outputs)


def _inputs(program: Program, cuts: tuple[Node, ...]) -> tuple[str, ...]:
    """The arrays that have the same address in every step, by the names that launches use."""
    names = ["token_ids" if v.name == "input_ids" else v.name for v in program.inputs]
    for group in program.resources:
        names += [f"slots:{group.name}", f"block_table:{group.name}"]
    if cuts:
        names += ["query_starts", "context_lengths"]
    return tuple(names)
