"""Facts about whole programs: one mixer a layer, token locality, dependence, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .cost import Cost, PagedLoad
from .errors import UnsupportedModelError
from .interpret import describe
from .ops import Kind, get_op
from .ops.base import is_token_dim
from .program import Node, Program, Value
from .types import TensorType

ROW_SYMBOLS = ("T", "R")
"""The symbols that count tokens of a step, and rows of logits."""
LOGITS_INDEX = "logits_index"


def check_mixer_per_layer(program: Program) -> None:
    """UnsupportedModelError unless each of the spec's layers has one mixer, causal.

    That is the op by which its tokens see earlier ones, whichever layer's cache it reads.
    """
    found: Counter[int] = Counter()
    for node in program.nodes:
        layer = node.attrs.get("layer")
        if get_op(node.op).mixer and isinstance(layer, int):
            found[layer] += 1
            if node.attrs.get("causal") is False:
                raise UnsupportedModelError(
                    f"attention of layer {layer} is not causal",
                    where=program.spec.architecture,
                    hint="a token would attend to later tokens, which do not exist yet",
                )
    for layer in range(program.spec.num_layers):
        if found[layer] == 1:
            continue
        what = "no attention op" if not found[layer] else f"{found[layer]} attention ops"
        raise UnsupportedModelError(
            f"layer {layer} was captured with {what}",
            where=program.spec.architecture,
            hint="the model computes attention in a way that capture does not see, or has none",
        )
    extra = sorted(set(found) - set(range(program.spec.num_layers)))
    if extra:
        raise UnsupportedModelError(
            f"an attention op names layer {extra[0]} of {program.spec.num_layers}",
            where=program.spec.architecture,
        )


def check_token_locality(program: Program, symbols: Sequence[str] = ROW_SYMBOLS) -> None:
    """UnsupportedModelError where something outside attention lets tokens see each other.

    A dimension that counts tokens is known by its symbol. It may only be a batch dimension:
    nothing may reduce, scan, index, cut, join or regroup it, make row numbers of it, or pair it
    with itself. Attention is exempt, and so is taking the rows that `logits_index` names. Run it
    after dead code is gone.
    """
    for node in program.nodes:
        reason = _mixes(program, node, symbols)
        if reason is not None:
            raise UnsupportedModelError(
                f"{describe(node)} {reason}: the result of a token would depend on other tokens",
                where=_place(program, node),
                hint="only attention may mix tokens; this model cannot be served in steps",
            )


def _place(program: Program, node: Node) -> str:
    name = program.spec.architecture
    return name if node.layer is None else f"{name}, layer {node.layer}"


def _mixes(program: Program, node: Node, symbols: Sequence[str]) -> str | None:
    op = get_op(node.op)
    if op.kind in (Kind.ATTENTION, Kind.STATE) or _takes_logit_rows(node):
        return None
    types = [program.operand_type(operand) for operand in node.inputs]
    outs = tuple(value.type for value in node.outputs)
    for symbol in symbols:
        reason = op.mixes(types, outs, node.attrs, symbol)
        if reason is not None:
            return reason
    for kind in outs:
        if sum(is_token_dim(dim, symbol) for dim in kind.shape for symbol in symbols) > 1:
            return f"pairs tokens with tokens ({kind})"
    return None


def _takes_logit_rows(node: Node) -> bool:
    if node.op != "take" or len(node.inputs) != 2:
        return False
    index = node.inputs[1]
    return isinstance(index, Value) and index.name == LOGITS_INDEX


def depends_only_on(program: Program, inputs: Iterable[str]) -> frozenset[str]:
    """Names of the node results that depend on no other input than these (or on none).

    What paged state says counts as depending on everything.
    """
    allowed = set(inputs)
    known = {value.name: value.name in allowed for value in program.inputs}
    for node in program.nodes:
        fine = not get_op(node.op).effects and all(known[v.name] for v in node.values())
        known.update({value.name: fine for value in node.outputs})
    results = {value.name for node in program.nodes for value in node.outputs}
    return frozenset(name for name in results if known[name])


def node_label(node: Node) -> str:
    """What a node is called in reports: its first result, or op and layer where it has none."""
    return node.outputs[0].name if node.outputs else f"{node.op}:{node.layer}"


@dataclass(frozen=True, slots=True)
class StepLoad:
    """Among how many sequences a step's tokens are shared, and how much each has then stored."""

    sequences: int
    context: int


def node_cost(
    program: Program, node: Node, bindings: Mapping[str, int], load: StepLoad | None = None
) -> Cost:
    """What one node moves and computes where each symbol has the bound value.

    `load` says what paged state holds; by default all tokens are those of one new sequence.
    """
    types = [program.operand_type(operand) for operand in node.inputs]
    op = get_op(node.op)
    if op.paged_cost is None:
        return op.cost(types, node.attrs, bindings)
    load = load or StepLoad(1, bindings.get(ROW_SYMBOLS[0], 1))
    paged = PagedLoad(load.sequences, load.context, token_bytes(program, node))
    return op.cost(types, node.attrs, bindings, paged)


def num_weights(program: Program, node: Node, place: int) -> int:
    """How many numbers operand `place` of a node has; of codes `[.., N, width]`, `N * K`."""
    types = [program.operand_type(operand) for operand in node.inputs]
    kind = types[place]
    rule = get_op(node.op).code_depths
    depths = rule(types, node.attrs) if rule else {}
    assert isinstance(kind, TensorType), "a number is no weight"
    if place in depths:
        kind = TensorType(kind.dtype, (*kind.shape[:-1], depths[place]))
    return kind.num_elements()


def token_bytes(program: Program, node: Node) -> int:
    """Bytes that one layer keeps of a token, in the group that the node names."""
    for group in program.resources:
        if group.name == node.attrs.get("group"):
            return group.bytes_per_block() // (len(group.layers) * group.block_size)
    return 0


def total_cost(program: Program, bindings: Mapping[str, int], load: StepLoad | None = None) -> Cost:
    """The sum of the nodes' costs where each symbol has the bound value (see `node_cost`)."""
    total = Cost()
    for node in program.nodes:
        total += node_cost(program, node, bindings, load)
    return total
