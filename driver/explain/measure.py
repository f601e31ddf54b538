"""A program's nodes as facts: what each moves and computes, and who made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby

from ...ir.analyses import StepLoad, node_cost, node_label, num_weights
from ...ir.cost import Cost
from ...ir.errors import UsageError
from ...ir.manifest import Limits
from ...ir.ops import Kind, get_op
from ...ir.ops.base import AFTER_LOWERING, Op
from ...ir.program import Node, Program, Value, WeightRef
from ...ir.text import print_attr
from .facts import (
    NO_COSTS,
    Costs,
    LayerFacts,
    NearMissFacts,
    NodeFacts,
    OpFacts,
    ProgramFacts,
    SchemeFacts,
    WeightFacts,
    Workload,
)
from .listing import fold_layers, list_program, relative_module, run_title
from .shape import model_shape


def choose_workload(
    limits: Limits, batch: int | None, context: int | None, tokens: int | None
) -> Workload:
    """The workload of these numbers; what is None is 1, the whole context, and a full step.

    UsageError where the artifact was not compiled for so much.
    """
    chosen = Workload(
        batch=1 if batch is None else batch,
        context=limits.max_context if context is None else context,
        tokens=min(limits.step_tokens, context or limits.max_context) if tokens is None else tokens,
    )
    largest = min(limits.max_sequences, limits.logit_rows, limits.step_tokens)
    _check("batch", chosen.batch, largest, "sequences in a step")
    _check("context", chosen.context, limits.max_context, "tokens of context")
    _check("tokens", chosen.tokens, limits.step_tokens, "tokens in a step")
    if chosen.tokens > chosen.context:
        raise UsageError(
            f"{chosen.tokens} prompt tokens exceed the context of {chosen.context}",
            hint="raise --context, or lower --tokens",
        )
    return chosen


def fitted_workload(limits: Limits, workload: Workload) -> Workload:
    """As much of a workload as a program with these limits takes."""
    context = min(workload.context, limits.max_context)
    most = (limits.max_sequences, limits.logit_rows, limits.step_tokens)
    return Workload(
        batch=min(workload.batch, *most),
        context=context,
        tokens=min(workload.tokens, limits.step_tokens, context),
    )


def _check(name: str, value: int, most: int, what: str) -> None:
    if not 1 <= value <= most:
        raise UsageError(f"--{name} is {value}, expected 1 to {most} {what}")


def measure_program(
    program: Program,
    workload: Workload,
    makers: Mapping[str, str] | None = None,
    near_misses: Iterable[NearMissFacts] = (),
) -> ProgramFacts:
    """The facts of a program; `makers` says by label which pass made a node."""
    missed: dict[str, list[NearMissFacts]] = {}
    for miss in near_misses:
        if miss.node is not None:
            missed.setdefault(miss.node, []).append(miss)
    nodes = tuple(
        _node(program, node, workload, (makers or {}).get(node_label(node)), missed)
        for node in program.nodes
    )
    outside = _sum(node.costs for node in nodes if node.layer is None)
    return ProgramFacts(
        phase=program.phase,
        shape=model_shape(program),
        nodes=nodes,
        ops=tuple(_ops(nodes)),
        layers=tuple(_layers(program, nodes)),
        outside=outside,
        total=_sum(node.costs for node in nodes),
        schemes=tuple(_schemes(nodes)),
    )


def node_costs(program: Program, node: Node, workload: Workload) -> Costs:
    """What a node moves and computes in the two steps."""
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    prompt = {**bounds, "T": workload.tokens, "R": 1, "B": 1}
    prefill = node_cost(program, node, prompt, StepLoad(1, workload.context))
    if program.phase not in AFTER_LOWERING:
        return Costs(decode=Cost(), prefill=prefill)
    batch = {**bounds, "T": workload.batch, "R": workload.batch, "B": workload.batch}
    load = StepLoad(workload.batch, workload.context)
    return Costs(decode=node_cost(program, node, batch, load), prefill=prefill)


def _sum(costs: Iterable[Costs]) -> Costs:
    return sum(costs, NO_COSTS)


def _node(
    program: Program,
    node: Node,
    workload: Workload,
    made_by: str | None,
    missed: Mapping[str, list[NearMissFacts]],
) -> NodeFacts:
    op = get_op(node.op)
    return NodeFacts(
        label=node_label(node),
        op=node.op,
        kind=op.kind.value,
        layer=node.layer,
        module=relative_module(node.source, node.layer),
        source=node.source,
        made_by=made_by,
        inputs=tuple(
            str(one) if isinstance(one, (Value, WeightRef)) else print_attr(one)
            for one in node.inputs
        ),
        results=tuple((value.name, str(value.type)) for value in node.outputs),
        attrs={name: print_attr(value) for name, value in node.attrs.items()},
        weights=tuple(_weights(program, node, op)),
        near_misses=tuple(missed.get(node_label(node), ())),
        costs=node_costs(program, node, workload),
    )


def _weights(program: Program, node: Node, op: Op) -> Iterable[WeightFacts]:
    for place, operand in enumerate(node.inputs):
        if isinstance(operand, WeightRef):
            kind = program.weights[operand.name].type
            yield WeightFacts(
                name=operand.name,
                operand=op.operands[min(place, len(op.operands) - 1)].rstrip("?*"),
                type=str(kind),
                num_bytes=kind.num_bytes(),
                num_elements=num_weights(program, node, place),
            )


def _ops(nodes: Iterable[NodeFacts]) -> list[OpFacts]:
    """By operation, the one that moves most in both steps first."""
    found: dict[str, list[NodeFacts]] = {}
    for node in nodes:
        found.setdefault(node.op, []).append(node)
    facts = [
        OpFacts(
            op=op,
            count=len(members),
            made_by=dict(Counter(node.made_by for node in members if node.made_by)),
            costs=_sum(node.costs for node in members),
        )
        for op, members in found.items()
    ]
    return sorted(facts, key=_weight_of, reverse=True)


def _weight_of(op: OpFacts) -> int:
    both = op.costs.decode + op.costs.prefill
    return both.bytes_read + both.bytes_written


def _layers(program: Program, nodes: Iterable[NodeFacts]) -> Iterable[LayerFacts]:
    listing = list_program(program)
    groups = {group.name for group in program.resources}
    ordered = sorted((node for node in nodes if node.layer is not None), key=_layer)
    by_layer = {layer: tuple(members) for layer, members in groupby(ordered, key=_layer)}
    for run in fold_layers(listing.layers):
        for layer in run.shown:
            members = by_layer.get(layer, ())
            own = {w.name: w.num_bytes for node in members for w in node.weights}
            named = (node.attrs.get("group", "").strip('"') for node in members)
            yield LayerFacts(
                title=run_title(run, layer),
                layers=tuple(run.members(layer)),
                nodes=len(members),
                kv_group=next((name for name in named if name in groups), None),
                weight_bytes=sum(own.values()),
                costs=_sum(node.costs for node in members),
            )


def _layer(node: NodeFacts) -> int:
    return -1 if node.layer is None else node.layer


def _schemes(nodes: Iterable[NodeFacts]) -> Iterable[SchemeFacts]:
    """How the matrices of products are held, each matrix once, scales with the codes they scale."""
    seen: set[str] = set()
    found: dict[tuple[str, str], list[int]] = {}
    for node in nodes:
        if node.kind not in (Kind.MATRIX.value, Kind.EXPERTS.value):
            continue
        fresh = [w for w in node.weights if w.name not in seen and "bias" not in w.operand]
        seen.update(weight.name for weight in fresh)
        matrices = [w for w in fresh if not w.operand.endswith("scale")]
        if not matrices:
            continue
        scheme = node.attrs.get("scheme", '"dense"').strip('"')
        dtype = matrices[0].type.partition("[")[0]
        sums = found.setdefault((scheme, dtype), [0, 0, 0])
        sums[0] += len(matrices)
        sums[1] += sum(weight.num_elements for weight in matrices)
        sums[2] += sum(weight.num_bytes for weight in fresh)
    for (scheme, dtype), (count, elements, size) in found.items():
        yield SchemeFacts(
            scheme=scheme, dtype=dtype, matrices=count, num_elements=elements, num_bytes=size
        )
