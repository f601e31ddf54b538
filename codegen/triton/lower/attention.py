"""Rotary positions, the KV cache and attention over it."""

from __future__ import annotations

from ....ir.launches import Extent
from ....ir.program import Node, Program
from ....ir.resources import KvGroup, element_type
from ..buffers import Buffer
from ..calls import Constant, Passed, Tuning, Typed
from ..configurations import AttentionBlock, attention_block
from ..emitter import FEW_TOKENS, Emitter, Lowering, Rows, power_of_two, step_array, whole

SPLIT_POSITIONS = 256
MOST_SPLITS = 64
MOST_SPLITS_OF_MANY = 16
"""Of a sequence: longer contexts have longer splits, as their sums lie in memory. Many sequences
keep a GPU busy with fewer."""


def table_width(program: Program, group: KvGroup) -> int:
    """Blocks of a sequence in the longest context."""
    return -(-program.spec.max_context // group.block_size)


def lower_rotary(e: Emitter, node: Node) -> None:
    """`rotary(positions, frequencies)`: the angles of a step's tokens, once for all layers."""
    positions, frequencies = (e.dense(e.buffer(operand)) for operand in node.inputs)
    out = e.output(node.output)
    tokens, width = out.shape
    width = whole(width, "a row of angles")
    scale = node.attrs["scale"]
    assert isinstance(scale, float)
    e.launch(
        "positions.rotary",
        [tokens],
        {"positions": positions, "frequencies": frequencies, "out": out, "scale": scale},
        {
            "WIDTH": width,
            "BLOCK": power_of_two(width),
            "QUARTERS": int(node.attrs["function"] == "cos"),
        },
        Tuning(1),
    )


def lower_rope(e: Emitter, node: Node) -> None:
    """`rope(x, cos, sin)` alone."""
    x = e.rows(node.inputs[0], inner_dims=2)
    cos, sin = (e.dense(e.buffer(operand)) for operand in node.inputs[1:])
    out = e.output(node.output)
    heads, dim = (whole(size, "a head") for size in out.shape[1:])
    e.launch(
        "positions.rope",
        [x.count, heads],
        {"x": x.typed, "cos": cos, "sin": sin, "out": out},
        {"STRIDE": x.stride, "HEADS": heads, "D": dim, **_rotation(node, dim)},
        Tuning(1),
    )


def lower_kv_write(e: Emitter, node: Node) -> None:
    """`kv_write(k, v)`."""
    k, v = (e.rows(operand, inner_dims=2) for operand in node.inputs)
    group, pages, scales = e.cache(node)
    e.launch(
        "positions.kv_write",
        [k.count, group.num_kv_heads],
        {"k": k.typed, "v": v.typed, "pages": pages, "scales": scales, "slots": _slots(group)},
        {
            "K_STRIDE": k.stride,
            "V_STRIDE": v.stride,
            "G": group.num_kv_heads,
            "D": group.key_head_dim,
            "DV": group.value_head_dim,
            **_page(group),
            "BLOCK": power_of_two(max(group.key_head_dim, group.value_head_dim)),
        },
        Tuning(1),
    )


def lower_rope_kv_write(e: Emitter, node: Node) -> None:
    """`rope_kv_write(q, k, v, cos, sin)` → rotated q; k and v go to the cache."""
    q, k, v = (e.rows(operand, inner_dims=2) for operand in node.inputs[:3])
    cos, sin = (e.dense(e.buffer(operand)) for operand in node.inputs[3:])
    out = e.output(node.output)
    heads = whole(out.shape[1], "a token")
    group, pages, scales = e.cache(node)
    e.launch(
        "positions.rope_kv_write",
        [q.count, heads + group.num_kv_heads],
        {
            **{"q": q.typed, "k": k.typed, "v": v.typed, "cos": cos, "sin": sin, "out": out},
            **{"pages": pages, "scales": scales, "slots": _slots(group)},
        },
        {
            "Q_STRIDE": q.stride,
            "K_STRIDE": k.stride,
            "V_STRIDE": v.stride,
            "HEADS": heads,
            "G": group.num_kv_heads,
            "D": group.key_head_dim,
            "DV": group.value_head_dim,
            **_page(group),
            **_rotation(node, max(group.key_head_dim, group.value_head_dim)),
        },
        Tuning(1),
    )


def lower_paged_attention(e: Emitter, node: Node) -> None:
    """`paged_attention(q, sinks?)`: each row against its sequence's cache."""
    q = e.rows(node.inputs[0], inner_dims=2)
    out = e.output(node.output)
    sinks = [e.dense(e.buffer(operand)) for operand in node.inputs[1:]]
    if e.form.one_query:
        _splits(e, node, q, out, sinks)
    else:
        _tiles(e, node, q, out, sinks)


def query_tile(e: Emitter, node: Node, group: KvGroup) -> int:
    """Query rows of a sequence in a tile, as the node's kernel would like it."""
    share = whole(node.output.type.shape[1], "a token") // group.num_kv_heads
    return max(1, _block(e, "tiles", group).rows // share)


def _tiles(e: Emitter, node: Node, q: Rows, out: Buffer, sinks: list[Buffer]) -> None:
    group, pages, scales = e.cache(node)
    block = _block(e, "tiles", group)
    share = whole(out.shape[1], "a token") // group.num_kv_heads
    passed: dict[str, Passed | Buffer] = {
        **{"q": q.typed, "pages": pages, "scales": scales},
        **{"sinks": sinks[0] if sinks else out, "out": out},
        **{name: step_array(array) for name, array in _TILE_ARRAYS.items()},
        "table": step_array(f"block_table:{group.name}"),
        **_numbers(node),
    }
    e.launch(
        "attention.attend_tiles",
        [Extent(1, "tiles"), group.num_kv_heads],
        passed,
        {
            **_heads(q, out, group),
            "TILE": e.form.query_tile,
            "BM": power_of_two(e.form.query_tile * share, 16),
            "BN": block.keys,
            **_page(group),
            "TABLE_WIDTH": table_width(e.program, group),
            **_limits(node),
            "SINK": bool(sinks),
        },
        block.tuning,
    )


_TILE_ARRAYS = {
    "starts": "query_starts",
    "lengths": "context_lengths",
    "tile_sequences": "tile_sequences",
    "tile_rows": "tile_rows",
}


def _splits(e: Emitter, node: Node, q: Rows, out: Buffer, sinks: list[Buffer]) -> None:
    group, pages, scales = e.cache(node)
    block = _block(e, "splits", group)
    heads, value_dim = (whole(size, "a head") for size in out.shape[1:])
    longest = e.program.spec.max_context
    most = MOST_SPLITS if e.form.max_tokens <= FEW_TOKENS else MOST_SPLITS_OF_MANY
    split = SPLIT_POSITIONS * -(-longest // (SPLIT_POSITIONS * most))
    splits = -(-longest // split)
    cells = e.most(out.shape[0]) * heads * splits
    partial = Typed(e.scratch("partial", cells * value_dim * 4), "fp32")
    tops = Typed(e.scratch("tops", cells * 8), "fp32")
    arrived = Typed(e.counter("arrived", e.most(out.shape[0]) * group.num_kv_heads), "i32")
    e.launch(
        "attention.attend_splits",
        [out.shape[0], group.num_kv_heads, splits],
        {
            **{"q": q.typed, "pages": pages, "scales": scales},
            **{"sinks": sinks[0] if sinks else out, "out": out},
            **{"partial": partial, "tops": tops, "arrived": arrived},
            "lengths": step_array("context_lengths"),
            "table": step_array(f"block_table:{group.name}"),
            **_numbers(node),
        },
        {
            **_heads(q, out, group),
            "BM": power_of_two(heads // group.num_kv_heads, 16),
            "BN": block.keys,
            "SPLIT": split,
            "SPLITS": splits,
            **_page(group),
            "TABLE_WIDTH": table_width(e.program, group),
            **_limits(node),
            "SINK": bool(sinks),
        },
        block.tuning,
    )


def _block(e: Emitter, kind: str, group: KvGroup) -> AttentionBlock:
    bits = 8 * element_type(group.dtype).size_bytes
    head = max(group.key_head_dim, group.value_head_dim)
    return attention_block(e.target, kind=kind, head=head, bits=bits)


def _heads(q: Rows, out: Buffer, group: KvGroup) -> dict[str, Constant]:
    return {
        "Q_STRIDE": q.stride,
        "HEADS": whole(out.shape[1], "a token"),
        "G": group.num_kv_heads,
        "D": group.key_head_dim,
        "DV": group.value_head_dim,
        "D_BLOCK": power_of_two(group.key_head_dim, 16),
        "DV_BLOCK": power_of_two(group.value_head_dim, 16),
    }


def _page(group: KvGroup) -> dict[str, Constant]:
    elements = group.bytes_per_block() // element_type(group.dtype).size_bytes
    return {"PAGE": elements, "BLOCK_SIZE": group.block_size}


def _numbers(node: Node) -> dict[str, Passed]:
    scale, cap = node.attrs["scale"], node.attrs["softcap"]
    assert isinstance(scale, float)
    return {"scale": scale, "cap": cap if isinstance(cap, float) else 1.0}


def _limits(node: Node) -> dict[str, Constant]:
    window = node.attrs["window"]
    return {
        "WINDOW": window if isinstance(window, int) else 0,
        "CAP": node.attrs["softcap"] is not None,
    }


def _rotation(node: Node, dim: int) -> dict[str, Constant]:
    rotary = node.attrs["rotary_dim"]
    assert isinstance(rotary, int)
    return {
        "ROTARY": rotary,
        "HALF_BLOCK": power_of_two(rotary // 2),
        "BLOCK": power_of_two(dim),
        "INTERLEAVED": node.attrs["style"] == "interleaved",
    }


def _slots(group: KvGroup) -> Typed:
    return step_array(f"slots:{group.name}")


LOWERINGS: dict[str, Lowering] = {
    "rotary": lower_rotary,
    "rope": lower_rope,
    "kv_write": lower_kv_write,
    "rope_kv_write": lower_rope_kv_write,
    "paged_attention": lower_paged_attention,
}
