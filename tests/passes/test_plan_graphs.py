"""The plan of captured graphs: sizes that cover every step, and nothing that a cut would break."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import PassError
from infc.ir.plan import planned_graphs
from infc.ir.program import Program
from infc.ir.text import parse_program, print_program
from infc.passes.base import PassContext
from infc.passes.plan_graphs import PlanGraphs, ladder
from infc.passes.plan_memory import PlanMemory

ATTENTION = """
program "attention" phase lowered {
  symbol T: 1..64
  resource full {layers = (0,), num_kv_heads = 1, key_head_dim = 4, value_head_dim = 4, \
dtype = "f32", block_size = 16, window = none}
  input %x: f32[T, 1, 4]
  %e = exp(%x) : f32[T, 1, 4]
  kv_write(%e, %e) {layer = 0, group = "full"}  layer 0
  %a = paged_attention(%e) {layer = 0, group = "full", value_head_dim = 4, scale = 0.5} : \
f32[T, 1, 4]  layer 0
  %r = reshape(%e) {shape = ("T", 4)} : f32[T, 4]
  %y = exp(%r) : f32[T, 4]
  output %a, %y
}
"""


def planned(**attrs: object) -> Program:
    program = PlanMemory().run(parse_program(ATTENTION), PassContext()).program
    return replace(program, attrs={**program.attrs, **attrs})  # type: ignore[dict-item]


@given(most=st.integers(0, 5000), parts=st.sampled_from([4, 32]), least=st.sampled_from([1, 8]))
def test_a_ladder_ascends_to_the_most_in_bounded_steps(most: int, parts: int, least: int) -> None:
    sizes = ladder(most, parts, least)
    assert all(one < other for one, other in pairwise(sizes))
    assert (sizes[-1] if sizes else 0) == most
    for one, other in pairwise(sizes):
        assert other - one <= max(8, one // parts), "padding takes more than its share"
        assert other <= 2 * one


def test_steps_are_cut_where_tokens_see_each_other() -> None:
    program = planned()
    result = PlanGraphs(sequences=4, tokens=0).run(program, PassContext())
    graphs = planned_graphs(parse_program(print_program(result.program)))
    assert result.matches == 2
    assert graphs.cuts == ("a",)
    assert graphs.buckets == (1, 2, 4) and graphs.pieces == ()
    assert "block_table:full" in graphs.inputs and "query_starts" in graphs.inputs


def test_a_loop_group_does_not_cross_a_cut() -> None:
    with pytest.raises(PassError, match=r"loop group of %e, %y crosses an attention node"):
        PlanGraphs().run(planned(loops=(("e", "y"),)), PassContext())


def test_what_is_read_behind_a_cut_has_a_place() -> None:
    program = planned()
    offsets = program.attrs["offsets"]
    assert isinstance(offsets, tuple)
    without = tuple(pair for pair in offsets if isinstance(pair, tuple) and pair[0] != "e")
    with pytest.raises(PassError, match="%e is read by %a = paged_attention"):
        PlanGraphs().run(planned(offsets=without), PassContext())
