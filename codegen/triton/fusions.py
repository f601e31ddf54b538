"""Neighbouring nodes that become fewer launches, where no pass has made one op of them.

A launch that stands for several nodes reads what they read until its last block has ended. The plan
of the arena knows nodes one by one, so that it may have given such a place to what the launch
writes; see `output_apart`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir.program import Node
from ...ir.row_codes import get_row_codes
from .apart import Apart
from .buffers import Buffer
from .calls import TYPES, extent
from .configurations import linear_tile
from .emitter import FEW_TOKENS, Emitter, Rows, power_of_two, whole
from .lower.coded import product_by_codes
from .lower.gather import pick_rows
from .lower.matrix import activated, activation, product_of_rows
from .lower.norms import epsilon, norm_rows, post_norm, row_tuning, weights_of_norm

Fusion = Callable[[Emitter, Sequence[Node]], int]

MOST_TOGETHER = 4
"""Nodes that a fusion looks at."""
_WIDEST_GATE = 16384
"""Elements of a row, twice as many of which a block holds."""


def lower_together(e: Emitter, nodes: Sequence[Node]) -> int:
    """Lower the first of some neighbours together with those behind it; how many of them.

    0, and nothing is lowered, where each is on its own.
    """
    for fusion in _FUSIONS.get(nodes[0].op, ()):
        if count := fusion(e, nodes):
            return count
    return 0


def _is_alone(e: Emitter, first: Node, second: Node) -> bool:
    """Whether only the second reads what the first makes, as its first operand."""
    value = first.outputs[0]
    if value in e.program.outputs or e.consumers.get(value.name, []) != [second]:
        return False
    return second.inputs[0] == value and second.values().count(value) == 1


def _ops(nodes: Sequence[Node], *ops: str) -> bool:
    return tuple(node.op for node in nodes[: len(ops)]) == ops


def _embedding_cast(e: Emitter, nodes: Sequence[Node]) -> int:
    """Rows of a table in another type. Nothing that is read lies in the arena, so that the result
    can have its planned place one node too early."""
    if not _ops(nodes, "embedding", "cast") or not _is_alone(e, *nodes[:2]):
        return 0
    e.nodes = tuple(nodes[:2])
    pick_rows(e, e.rows(nodes[0].inputs[0]), nodes[0].inputs[1], nodes[1].output)
    return 2


def _product_act(e: Emitter, nodes: Sequence[Node]) -> int:
    """A product with the activation behind it. A gated one needs two sums, which are registers
    enough for few rows only: these wait for launches."""
    if len(nodes) < 2 or not _is_alone(e, *nodes[:2]):
        return 0
    product, act = nodes[:2]
    gated = act.op == "gated_act"
    if not (e.form.one_query if gated else activation(act)):
        return 0
    e.nodes = (product, act)
    x = e.rows(product.inputs[0])
    read: list[Rows | Buffer] = [x]
    if product.op == "scaled_linear":
        read.append(e.dense(e.buffer(product.inputs[1])))
    out = Apart(e, product).output(act.output, read)
    if product.op != "linear":
        product_by_codes(e, product, x, out, act)
    elif gated:
        _linear_gated(e, product, act, x, out)
    else:
        product_of_rows(e, product, x, out, act=act)
    return 2


def _linear_gated(e: Emitter, linear: Node, gated: Node, x: Rows, out: Buffer) -> None:
    w, *bias = (e.dense(e.buffer(operand)) for operand in linear.inputs[1:])
    n = whole(gated.output.type.shape[-1], "a row")
    rows = e.most(x.count)
    tile = linear_tile(e.target, rows=rows, bits=8 * w.dtype.size_bytes)
    columns = max(16, tile.columns // 2)
    e.launch(
        "linear.linear_gated",
        [extent(n, divisor=columns), extent(x.count, divisor=tile.rows)],
        {
            **{"x": x.typed, "w": w, "bias": bias[0] if bias else w, "out": out},
            **{"M": extent(x.count), "N": n, "K": x.length, "x_stride": x.stride},
        },
        {
            **{"BM": tile.rows, "BN": columns, "BK": tile.depth},
            **{"EVEN": x.length % tile.depth == 0, "BIAS": bool(bias)},
            **activated(linear, gated),
        },
        tile.tuning,
    )


def _norm_linear(e: Emitter, nodes: Sequence[Node]) -> int:
    """A norm whose rows only the product behind it reads, and the activation behind that."""
    count = _normed(e, nodes)
    if count:
        e.nodes = tuple(nodes[:count])
        _product_of_normed(e, e.rows(nodes[0].inputs[0]), nodes[:count])
    return count


def _linear_add_norm_linear(e: Emitter, nodes: Sequence[Node]) -> int:
    """A product with the residual addition behind it, then the norm of the sum as above."""
    adds = len(nodes) > 1 and nodes[1].op in ("add_rms_norm", "add_layer_norm")
    if not adds or not _is_alone(e, *nodes[:2]):
        return 0
    count = _normed(e, nodes[1:])
    if not count:
        return 0
    linear, norm = nodes[:2]
    total = norm.outputs[1]
    e.nodes = (linear, norm)
    residual = e.rows(e.dense(e.buffer(norm.inputs[1])))
    x = e.rows(linear.inputs[0])
    out = Apart(e, linear).output(total, [x, residual])
    product_of_rows(e, linear, x, out, residual=residual.buffer)
    _product_of_normed(e, e.rows(out), nodes[1 : 1 + count])
    return 1 + count


def _normed(e: Emitter, nodes: Sequence[Node]) -> int:
    """How many of a norm, a product and an activation are one launch; 0 if not even two are.

    Each block of a product norms the rows again. That costs less than a launch while they are few.
    """
    if not e.form.one_query or e.form.max_tokens > FEW_TOKENS or len(nodes) < 2:
        return 0
    if nodes[1].op != "linear" or not _is_alone(e, *nodes[:2]):
        return 0
    if len(nodes) < 3 or not _is_alone(e, *nodes[1:3]):
        return 2
    return 3 if activation(nodes[2]) else 2


def _post_norm(e: Emitter, nodes: Sequence[Node]) -> int:
    """A norm of what is added to the residual, and the norm of the sum; codes of these rows too."""
    if not _ops(nodes, "rms_norm", "add_rms_norm") or not _is_alone(e, *nodes[:2]):
        return 0
    post, norm = nodes[:2]
    if not _keeps_type(post):
        return 0
    if count := _codes_of_norm(e, nodes[1:], post):
        return 1 + count
    e.nodes = (post, norm)
    read = [e.rows(post.inputs[0]), e.rows(e.dense(e.buffer(norm.inputs[1])))]
    norm_rows(e, norm, [Apart(e, post).output(value, read) for value in norm.outputs], post)
    return 2


def _keeps_type(norm: Node) -> bool:
    (x, *_) = norm.values()
    return x.type.dtype is norm.output.type.dtype


def _norm_codes(e: Emitter, nodes: Sequence[Node]) -> int:
    """A norm whose rows only become codes, alone or with the residual addition in front of it."""
    return _codes_of_norm(e, nodes, None)


def _codes_of_norm(e: Emitter, nodes: Sequence[Node], post: Node | None) -> int:
    if len(nodes) < 2 or nodes[1].op != "quantize_rows" or not _is_alone(e, *nodes[:2]):
        return 0
    norm, quantize = nodes[:2]
    first = post or norm
    e.nodes = (norm, quantize) if post is None else (post, norm, quantize)
    adds, layer = norm.op.startswith("add_"), norm.op.endswith("layer_norm")
    x = e.rows(first.inputs[0])
    w, *bias = (e.dense(e.buffer(operand)) for operand in weights_of_norm(norm))
    block, group = power_of_two(x.length), _group(quantize, x.length)
    read, total = [x], x.buffer
    if adds:
        read.append(e.rows(e.dense(e.buffer(norm.inputs[1]))))
        total = Apart(e, first).output(norm.outputs[1], read if post else [])
    written = [*read, e.rows(total)]
    codes, scales = (Apart(e, first).output(value, written) for value in quantize.outputs)
    before = post_norm(e, post, w)
    e.launch(
        "normed.norm_codes",
        [x.count],
        {
            **{"x": x.typed, "residual": read[-1].typed, "w": w, "b": bias[0] if bias else w},
            **{"post": before.passed["post"], "total": total, "codes": codes, "scales": scales},
            **{"eps": epsilon(norm), "post_eps": before.passed["post_eps"]},
        },
        {
            **{"STRIDE": x.stride, "WIDTH": x.length, "BLOCK": max(block, group)},
            **{"GROUP": group, "ADD": adds, "EARLY": bool(norm.attrs.get("round_before_scale"))},
            **{"POST": before.kind, "LAYER": layer, "BIAS": bool(bias)},
            "NORMED": TYPES[norm.outputs[0].type.dtype],
        },
        row_tuning(block),
    )
    return 2


def _group(quantize: Node, length: int) -> int:
    """How many elements have a scale, as a block has them."""
    if quantize.attrs["group"]:
        return get_row_codes(quantize.attrs["codes"]).group
    return power_of_two(length)


def _gated_codes(e: Emitter, nodes: Sequence[Node]) -> int:
    """A gated activation whose rows only become codes."""
    if not _ops(nodes, "gated_act", "quantize_rows") or not _is_alone(e, *nodes[:2]):
        return 0
    gated, quantize = nodes[:2]
    e.nodes = (gated, quantize)
    x = e.rows(gated.inputs[0])
    width = x.length // 2
    group = _group(quantize, width)
    if group > _WIDEST_GATE:
        return 0
    block = max(group, min(1024, power_of_two(width)))
    codes, scales = (Apart(e, gated).output(value, [x]) for value in quantize.outputs)
    e.launch(
        "normed.gated_codes",
        [x.count, extent(width, divisor=block)],
        {"x": x.typed, "codes": codes, "scales": scales},
        {
            **{"STRIDE": x.stride, "WIDTH": width, "BLOCK": block, "GROUP": group},
            **{"ACT": activation(gated) or "", "GATED": TYPES[gated.output.type.dtype]},
        },
        row_tuning(block),
    )
    return 2


def _product_of_normed(e: Emitter, x: Rows, nodes: Sequence[Node]) -> None:
    norm, linear = nodes[:2]
    act = nodes[2] if len(nodes) > 2 else None
    gated = act is not None and act.op == "gated_act"
    e.nodes = tuple(nodes)
    scale, *shift = (e.dense(e.buffer(operand)) for operand in weights_of_norm(norm))
    w, *bias = (e.dense(e.buffer(operand)) for operand in linear.inputs[1:])
    result = nodes[-1].output
    n = whole(result.type.shape[-1], "a row")
    tile = linear_tile(e.target, rows=e.most(x.count), bits=8 * w.dtype.size_bytes)
    columns = max(16, tile.columns // 2) if gated else tile.columns
    out = Apart(e, norm).output(result, [x])
    e.launch(
        "normed.normed_linear",
        [extent(n, divisor=columns), extent(x.count, divisor=tile.rows)],
        {
            **{"x": x.typed, "scale": scale, "shift": shift[0] if shift else scale},
            **{"w": w, "bias": bias[0] if bias else w, "out": out, "eps": epsilon(norm)},
            **{"M": extent(x.count), "N": n, "K": x.length, "x_stride": x.stride},
        },
        {
            **{"BM": tile.rows, "BN": columns, "BK": tile.depth},
            **{"EVEN": x.length % tile.depth == 0, "BIAS": bool(bias)},
            **{"EARLY": bool(norm.attrs.get("round_before_scale"))},
            **{"LAYER": norm.op.endswith("layer_norm"), "SHIFT": bool(shift)},
            **{"NORMED": TYPES[norm.outputs[0].type.dtype]},
            **{**activated(linear, act), "GATED": gated},
        },
        tile.tuning,
    )


_FUSIONS: dict[str, tuple[Fusion, ...]] = {
    "embedding": (_embedding_cast,),
    "linear": (_linear_add_norm_linear, _product_act),
    "scaled_linear": (_product_act,),
    "decoded_linear": (_product_act,),
    "rms_norm": (_post_norm, _norm_linear, _norm_codes),
    "add_rms_norm": (_norm_codes,),
    "layer_norm": (_norm_linear, _norm_codes),
    "add_layer_norm": (_norm_codes,),
    "gated_act": (_gated_codes,),
}
"""By the op of the first node; the first that holds is used."""
