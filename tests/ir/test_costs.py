"""What ops say they move and compute, against a count of what their meanings see."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from infc.ir.analyses import StepLoad, node_cost, total_cost
from infc.ir.builder import ProgramBuilder
from infc.ir.ops import Cost, Kind, all_ops, get_op
from infc.ir.ops.attention import visible_pairs
from infc.ir.program import Program
from infc.ir.resources import KvGroup
from infc.ir.types import DType, Sym, TensorType

T = Sym("T")
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
ATTENTION = {"layer": 0, "scale": 0.5, "softcap": None}


def paged(window: int | None) -> Program:
    """One layer of paged attention and the write before it, in bf16."""
    b = ProgramBuilder("paged")
    b.symbol("T")
    q = b.input("q", TensorType(DType.BF16, (T, HEADS, DIM)))
    k = b.input("k", TensorType(DType.BF16, (T, KV_HEADS, DIM)))
    v = b.input("v", TensorType(DType.BF16, (T, KV_HEADS, VALUE_DIM)))
    place = {"layer": 0, "group": "g"}
    b.add("kv_write", (k, v), place)
    attrs = {**place, "window": window, "scale": 0.5, "softcap": None, "value_head_dim": VALUE_DIM}
    b.output(b.add("paged_attention", (q,), attrs).output)
    b.resources = (KvGroup("g", (0,), KV_HEADS, DIM, VALUE_DIM, "bf16", 16, window),)
    b.phase = "lowered"
    return b.build()


@given(st.integers(1, 12), st.integers(0, 20), st.one_of(st.none(), st.integers(1, 9)))
def test_pairs_are_those_of_the_mask(queries: int, before: int, window: int | None) -> None:
    context = queries + before
    counted = sum(
        query - key >= 0 and (window is None or query - key < window)
        for query in range(before, context)
        for key in range(context)
    )
    assert visible_pairs(queries, context, window) == counted


@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_paged_attention_counts_what_each_sequence_has(
    tokens: int, sequences: int, context: int, window: int | None
) -> None:
    program = paged(window)
    write, attend = program.nodes
    load = StepLoad(sequences, context)
    bindings = {"T": tokens}
    shares = [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
    keys = pairs = 0
    for share in filter(None, shares):
        held = max(context, share)
        places = range(held - share, held)
        visible = [[k for k in range(p + 1) if window is None or p - k < window] for p in places]
        pairs += sum(len(row) for row in visible)
        keys += len({key for row in visible for key in row})
    token_bytes = KV_HEADS * (DIM + VALUE_DIM) * 2
    cost = node_cost(program, attend, bindings, load)
    assert cost.bytes_read == tokens * HEADS * DIM * 2 + keys * token_bytes
    assert cost.bytes_written == tokens * HEADS * VALUE_DIM * 2
    assert cost.flops - tokens * HEADS * VALUE_DIM == pairs * 2 * HEADS * (DIM + VALUE_DIM)
    written = node_cost(program, write, bindings, load)
    assert written == Cost(tokens * token_bytes, tokens * token_bytes, 0)


def test_without_a_load_a_step_is_one_new_sequence() -> None:
    program = paged(None)
    assert total_cost(program, {"T": 7}) == total_cost(program, {"T": 7}, StepLoad(1, 7))
    longer = total_cost(program, {"T": 7}, StepLoad(1, 100))
    assert longer.bytes_read > total_cost(program, {"T": 7}).bytes_read


@given(st.integers(1, 30), st.one_of(st.none(), st.integers(1, 9)), st.booleans())
def test_captured_attention_counts_visible_pairs(
    tokens: int, window: int | None, causal: bool
) -> None:
    q, k = (TensorType(DType.F32, (T, heads, DIM)) for heads in (HEADS, KV_HEADS))
    attrs: Mapping[str, object] = {**ATTENTION, "window": window, "causal": causal}
    op = get_op("attention")
    complete = op.complete(attrs, [q, k, k])
    pairs = visible_pairs(tokens, tokens, window) if causal else tokens * tokens
    assert op.cost([q, k, k], complete, {"T": tokens}).flops == pairs * 4 * HEADS * DIM


def test_rope_reads_the_angles_of_its_tokens() -> None:
    x = TensorType(DType.F32, (T, HEADS, DIM))
    angles = TensorType(DType.F32, (T, DIM // 2))
    types = [x, angles, angles]
    cost = get_op("rope").cost(types, {"style": "half", "rotary_dim": DIM}, {"T": 3})
    assert cost.bytes_read == 3 * (HEADS * DIM + DIM) * 4
    assert cost.flops == 3 * 3 * HEADS * DIM


def test_views_move_nothing() -> None:
    views = {op.name for op in all_ops() if op.kind is Kind.VIEW}
    assert views == {"reshape", "transpose", "expand", "slice", "concat"}
    x = TensorType(DType.F32, (T, 8))
    cases: dict[str, dict[str, object]] = {
        "reshape": {"shape": ("T", 2, 4)},
        "transpose": {"perm": (1, 0)},
        "expand": {"shape": (3, "T", 8)},
        "slice": {"dim": 1, "start": 0, "stop": 4},
    }
    for name, attrs in cases.items():
        op = get_op(name)
        assert op.cost([x], op.complete(attrs, [x]), {"T": 5}) == Cost(), name
    joined = get_op("concat").cost([x, x], {"dim": 1}, {"T": 5})
    assert joined == Cost(5 * 16 * 4, 5 * 16 * 4, 0)
