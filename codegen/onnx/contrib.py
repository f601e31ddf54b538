"""The dialect of onnxruntime: its own ops where they do more in one, or do it faster."""

from __future__ import annotations

from typing import ClassVar, Final

from ...ir.ops.state import cache_of
from ...ir.program import Node
from ...ir.resources import KvGroup
from ...ir.schemes import Scheme, get_scheme
from ...ir.types import DType, Sym
from .attended import Heads
from .caches import stored_name, written_name
from .emitter import Emitter, Lowering
from .graph import CONTRIB
from .layouts import CodedMatrix
from .lower import coded, experts
from .lower.pointwise import activate
from .slots import Slots
from .types import STORED


class GroupedQueries(Slots):
    """Slots that `GroupQueryAttention` writes and attends to, for rows of different lengths.

    It takes keys and values in float32, and of one size. Caches of other layers, and of other
    kinds, are written and read by ops of the standard.
    """

    name: ClassVar[str] = "grouped-queries"

    def __init__(self, emitter: Emitter) -> None:
        super().__init__(emitter)
        self._waiting: dict[int, tuple[str, str]] = {}
        # A layer that writes in front of the attention of the same layer.
        attending = [node for node in emitter.program.nodes if node.op == "paged_attention"]
        self._own = {cache_of(node.attrs) for node in attending if _reads_its_own(node)}

    def declare(self) -> None:
        super().declare()
        for group in self.groups.values():
            rows = f"S.{group.name}"
            self.graph.input(f"seqlens_k.{group.name}", DType.I32, (rows,))
            self.graph.input(f"query_seqlens.{group.name}", DType.I32, (rows,))
            self.graph.input(f"total_length.{group.name}", DType.I32, ())

    def write(self, node: Node, k: str, v: str) -> None:
        group, cache = self.group(node), cache_of(node.attrs)
        if cache in self._own and _fits(group):
            self._waiting[cache] = k, v
        else:
            super().write(node, k, v)

    def attend(self, node: Node, q: str, sinks: str | None) -> str:
        group, cache = self.group(node), cache_of(node.attrs)
        if not _reads_its_own(node) or cache not in self._waiting:
            return super().attend(node, q, sinks)
        heads = Heads.of(self.emitter, node, group)
        keys, values = self._waiting.pop(cache)
        parts = [self.padded(group, rows) for rows in (q, keys, values)]
        stored = [stored_name(cache, part) for part in ("key", "value")]
        counts = [f"{name}.{group.name}" for name in ("seqlens_k", "total_length")]
        rest = ["", "", "", "", sinks or "", "", "", "", "", f"query_seqlens.{group.name}"]
        window = node.attrs["window"]
        made = f"{self.graph.place}/GroupQueryAttention"
        result = self.graph.op(
            "GroupQueryAttention",
            [*parts, *stored, *counts, *rest],
            [made, *(written_name(cache, part) for part in ("key", "value"))],
            domain=CONTRIB,
            num_heads=heads.queries,
            kv_num_heads=heads.keys,
            scale=heads.scale,
            softcap=heads.softcap,
            local_window_size=window if isinstance(window, int) else -1,
        )
        return self.flat(group, result, heads.queries * heads.value_size)


def _reads_its_own(node: Node) -> bool:
    return cache_of(node.attrs) == node.attrs["layer"]


def is_grouped(node: Node, group: KvGroup) -> bool:
    """Whether a layer attends with `GroupQueryAttention`."""
    return _reads_its_own(node) and _fits(group)


def _fits(group: KvGroup) -> bool:
    return DType(group.dtype) is DType.F32 and group.key_head_dim == group.value_head_dim


def _add_rms_norm(emitter: Emitter, node: Node) -> None:
    graph = emitter.graph
    inputs = [emitter.operand(operand) for operand in node.inputs]
    made = f"{graph.place}/SkipSimplifiedLayerNormalization.{len(graph.nodes)}"
    graph.op(
        "SkipSimplifiedLayerNormalization",
        inputs,
        [made, "", "", f"{made}:sum"],
        domain=CONTRIB,
        epsilon=node.attrs["eps"],
    )
    emitter.give(node, made, f"{made}:sum")


def _gated_act(emitter: Emitter, node: Node) -> None:
    graph, act = emitter.graph, str(node.attrs["act"])
    gate, up = graph.split(emitter.operand(node.inputs[0]), -1)
    if act == "silu":  # in one op: that of the standard is run as two
        turned = graph.op("QuickGelu", [gate], domain=CONTRIB, alpha=1.0)
    else:
        turned = activate(graph, gate, act)
    emitter.give(node, graph.op("Mul", [turned, up]))


def _quantize_rows(emitter: Emitter, node: Node) -> None:
    """Rows in groups are quantized by the products that read them."""
    if not node.attrs["group"]:
        coded.LOWERINGS["quantize_rows"](emitter, node)
        return
    emitter.stand_in(node, emitter.operand(node.inputs[0]))


def _scaled_linear(emitter: Emitter, node: Node) -> None:
    graph = emitter.graph
    x, x_scale, codes, scales, *biases = node.inputs
    matrix = coded.matrix_of(emitter, codes, scales, node)
    rows = get_scheme(node.attrs["scheme"]).activations
    if not matrix.form.is_grouped:
        coded.LOWERINGS["scaled_linear"](emitter, node)
    elif rows is not None and rows.group:
        coded.finish(
            emitter, node, _product(emitter, emitter.operand(x), matrix, _IN_GROUPS), biases
        )
    else:
        wide = graph.op("Cast", [emitter.operand(x)], to=STORED[DType.F32])
        result = _product(emitter, wide, matrix, _FLOAT)
        column = graph.op("Unsqueeze", [emitter.operand(x_scale), graph.const([-1])])
        coded.finish(emitter, node, graph.op("Mul", [result, column]), biases)


def _decoded_linear(emitter: Emitter, node: Node) -> None:
    x, codes, scales, *biases = node.inputs
    matrix = coded.matrix_of(emitter, codes, scales, node)
    result = _product(emitter, emitter.operand(x), matrix, _FLOAT)
    coded.finish(emitter, node, result, biases)


def _by_codes(emitter: Emitter, x: str, matrix: CodedMatrix, scheme: Scheme) -> str:
    """Rows x `[T, K]` by a matrix of codes, as `coded.product`."""
    how = scheme.activations
    if not matrix.form.is_grouped:
        return coded.product(emitter, x, matrix, scheme)
    if how is None or how.group:
        return _product(emitter, x, matrix, _FLOAT if how is None else _IN_GROUPS)
    codes, scale = coded.quantized(emitter, x, (Sym("T"),), matrix.depth, 0)
    wide = emitter.graph.op("Cast", [codes], to=STORED[DType.F32])
    column = emitter.graph.op("Unsqueeze", [scale, emitter.graph.const([-1])])
    return emitter.graph.op("Mul", [_product(emitter, wide, matrix, _FLOAT), column])


def _product(emitter: Emitter, x: str, matrix: CodedMatrix, accuracy: int) -> str:
    parts = emitter.store(matrix.blocks()), emitter.store(matrix.line_scales())
    return emitter.graph.op(
        "MatMulNBits",
        [x, *parts],
        domain=CONTRIB,
        K=matrix.depth,
        N=matrix.rows,
        bits=matrix.form.bits,
        block_size=matrix.form.group,
        accuracy_level=accuracy,
    )


_FLOAT: Final = 1
_IN_GROUPS: Final = 4
"""Levels of accuracy: rows in float32, or as codes of 8 bits in groups as long as the weights'."""

LOWERINGS: Final[dict[str, Lowering]] = {
    "add_rms_norm": _add_rms_norm,
    "gated_act": _gated_act,
    "quantize_rows": _quantize_rows,
    "scaled_linear": _scaled_linear,
    "decoded_linear": _decoded_linear,
    "scaled_moe": experts.scaled(_by_codes),
}
