"""One layer of an artifact, or all nodes of one op: what the options of `infc inspect` pick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.errors import UsageError
from ...ir.nearest import did_you_mean
from ...ir.ops import get_op
from .amounts import format_bytes, format_operations, moved_bytes
from .facts import ArtifactFacts, LayerFacts, NodeFacts, ProgramFacts
from .text import WIDTH, Page, near_miss_lines, short_title

_NODE_HEAD = (
    "node", "type", "weights", ">decode bytes", ">ops", ">prefill bytes", ">ops", "made by",
)  # fmt: skip


def pick_nodes(
    facts: ArtifactFacts, layer: int | None = None, op: str | None = None
) -> tuple[NodeFacts, ...]:
    """The nodes of a layer, of an op, or of an op in a layer; UsageError where there are none."""
    program = _program(facts)
    layers = [one for shown in program.layers for one in shown.layers]
    if layer is not None and layer not in layers:
        raise UsageError(f"no layer {layer}", hint=f"it has {len(layers)}, counted from 0")
    if op is not None:
        _check_op(program, op)
    found = tuple(
        node
        for node in program.nodes
        if (layer is None or node.layer == layer) and (op is None or node.op == op)
    )
    if not found:
        raise UsageError(f"layer {layer} has no {op}")
    return found


def _program(facts: ArtifactFacts) -> ProgramFacts:
    if facts.program is None:
        raise UsageError("the artifact contains no program.ir", where=facts.path)
    return facts.program


def _check_op(program: ProgramFacts, op: str) -> None:
    used = [one.op for one in program.ops]
    if op in used:
        return
    hint = did_you_mean(op, used, f"it has {', '.join(used)}")
    raise UsageError(f"the program has no op {op!r}", hint=hint)


def render_nodes(
    facts: ArtifactFacts,
    layer: int | None = None,
    op: str | None = None,
    *,
    width: int = WIDTH,
    color: bool = False,
) -> str:
    """The picked nodes as a table, equal layers once, with what nearly happened to them."""
    nodes = pick_nodes(facts, layer, op)
    page = Page(width, color)
    program = _program(facts)
    if op is not None:
        page.lines(op, [get_op(op).doc])
    for shown in program.layers:
        chosen = shown.layers[0] if layer is None else layer
        if layer is not None and layer not in shown.layers:
            continue
        members = [node for node in nodes if node.layer == chosen]
        page.table(_title(shown, layer), _NODE_HEAD, [*_rows(members)])
    rest = [node for node in nodes if node.layer is None]
    page.table("outside the layers", _NODE_HEAD, [*_rows(rest)])
    misses = [miss for node in nodes for miss in node.near_misses]
    page.lines("why not (near misses)", near_miss_lines(misses))
    return page.text()


def _title(shown: LayerFacts, layer: int | None) -> str:
    kv = f", kv group {shown.kv_group}" if shown.kv_group else ""
    size = f", {format_bytes(shown.weight_bytes)} of weights"
    if layer is None:
        return f"{shown.title}{kv}{size}"
    others = len(shown.layers) - 1
    equal = f", equal to {others} others ({short_title(shown)})" if others else ""
    return f"layer {layer}{equal}{kv}{size}"


def _rows(nodes: Sequence[NodeFacts]) -> Iterator[Sequence[str]]:
    for node in nodes:
        types = ", ".join(dict.fromkeys(kind for _, kind in node.results)) or "-"
        weights = ", ".join(dict.fromkeys(weight.type for weight in node.weights)) or "-"
        cells = [
            cell
            for cost in (node.costs.decode, node.costs.prefill)
            for cell in (format_bytes(moved_bytes(cost)), format_operations(cost.flops))
        ]
        name = f"{node.module}.{node.op}" if node.module else node.op
        yield (name, types, weights, *cells, node.made_by or "captured")
