"""Which layers share keys and values, and what that spares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import UsageError
from infc.ir.ops.base import int_attr
from infc.ir.program import Program
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify
from infc.passes.base import PassContext
from infc.passes.cache_readers import cache_readers
from infc.passes.lower_kv import LowerKv
from infc.passes.pipeline import build_pipeline
from infc.passes.share_kv import ShareKv

T = Sym("T")


def model(windows: list[int | None], kv_heads: list[int]) -> Program:
    """Layers of attention alone, each with keys and values of its own."""
    b = ProgramBuilder("p")
    b.symbol("T")
    x = b.input("x", TensorType(DType.F32, (T, 8)))
    for layer, (window, heads) in enumerate(zip(windows, kv_heads, strict=True)):
        kind = TensorType(DType.F32, (4 * heads, 8))
        k, v = (
            b.emit("reshape", b.emit("linear", x, b.weight(name, kind)), shape=(T, heads, 4))
            for name in (f"k{layer}", f"v{layer}")
        )
        q = b.emit("reshape", x, shape=(T, 2, 4))
        out = b.emit("attention", q, k, v, layer=layer, scale=0.5, window=window)
        x = b.emit("reshape", out, shape=(T, 8))
    b.output(x)
    return b.build()


def shared(program: Program, **options: object) -> list[list[int]]:
    """The layers of each cache, after the pass; the program must be sound."""
    after = ShareKv(**options).run(program, PassContext()).program  # type: ignore[arg-type]
    verify(after)
    lowered = LowerKv().run(after, PassContext()).program
    verify(lowered)
    sets = [[int_attr(node.attrs, "layer") for node in nodes] for nodes in cache_readers(after)]
    writes = [int_attr(node.attrs, "layer") for node in lowered.nodes if node.op == "kv_write"]
    assert writes == [layers[0] for layers in sets]
    assert sorted(writes) == sorted(layer for group in lowered.resources for layer in group.layers)
    used = {ref.name for node in after.nodes for ref in node.weights()}
    assert used == {f"{name}{layers[0]}" for layers in sets for name in "kv"} == {*after.weights}
    return sets


@given(
    kinds=st.lists(st.tuples(st.sampled_from([None, 8]), st.sampled_from([1, 2])), min_size=1),
    factor=st.integers(1, 4),
)
def test_layers_of_a_kind_share_in_their_order(
    kinds: list[tuple[int | None, int]], factor: int
) -> None:
    found = shared(model([w for w, _ in kinds], [h for _, h in kinds]), factor=factor)
    assert sorted(layer for layers in found for layer in layers) == list(range(len(kinds)))
    for layers in found:
        assert len({kinds[layer] for layer in layers}) == 1
        assert layers == sorted(layers) and len(layers) <= factor
    for kind in set(kinds):
        sizes = [len(layers) for layers in found if kinds[layers[0]] == kind]
        assert all(size == factor for size in sizes[:-1]), "only the last may have fewer"


def test_named_layers_share() -> None:
    program = model([None] * 5, [1] * 5)
    assert shared(program, groups="4+2 0+1") == [[0, 1], [2, 4], [3]]
    assert shared(program) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "factor is 0, expected at least 1"),
        ({"factor": 2, "groups": "0+1"}, "both factor and groups are given"),
        ({"groups": "0-1"}, r"'0-1' is no group of layers.*0\+1 2\+3\+4"),
        ({"groups": "0+1 1+2"}, "layer 1 is named twice"),
        ({"groups": "0+7"}, "there is no layer 7"),
        ({"groups": "0+1+3"}, r"layers 0\+1\+3 differ in their keys and values or in their window"),
    ],
)
def test_what_is_no_group(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shared(model([None, None, None, 8], [1] * 4), **options)


def test_options_survive_as_text() -> None:
    pipeline = build_pipeline({"share-kv": {"groups": "0+1 2+3"}})
    assert build_pipeline(pipeline.spell()) == pipeline
