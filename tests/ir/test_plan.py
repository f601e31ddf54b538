"""The plan is read back as it was written, and nonsense in its place is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError
from infc.ir.plan import Arena, Graphs, loop_groups, planned_arena, planned_graphs
from infc.ir.program import Attr, Program


def program(**attrs: Attr) -> Program:
    """An empty program with these attributes."""
    return replace(ProgramBuilder("p").build(), attrs=attrs)


def test_a_plan_is_read_back() -> None:
    planned = program(loops=(("a", "b"), ("c",)), arena_bytes=128, offsets=(("a", 0), ("b", 64)))
    assert loop_groups(planned) == (("a", "b"), ("c",))
    assert planned_arena(planned) == Arena(128, {"a": 0, "b": 64})


def test_a_program_without_a_plan_has_an_empty_one() -> None:
    assert loop_groups(program()) == ()
    assert planned_arena(program()) == Arena(0, {})
    assert planned_graphs(program()) == Graphs()


def test_planned_graphs_are_read_back() -> None:
    planned = program(graph_buckets=(1, 2), graph_cuts=("a",), graph_inputs=("positions",))
    assert planned_graphs(planned) == Graphs((1, 2), (), ("a",), ("positions",))


@pytest.mark.parametrize(
    "attrs",
    [
        {"graph_buckets": 1},
        {"graph_buckets": ("a",)},
        {"graph_pieces": (2, 1)},
        {"graph_pieces": (0, 1)},
        {"graph_cuts": (1,)},
        {"graph_inputs": "positions"},
    ],
)
def test_nonsense_in_place_of_graphs_is_refused(attrs: dict[str, Attr]) -> None:
    with pytest.raises(ProgramError, match="graph_"):
        planned_graphs(program(**attrs))


@pytest.mark.parametrize(
    "attrs",
    [
        {"loops": 1},
        {"loops": ("a",)},
        {"loops": ((1,),)},
        {"offsets": "a"},
        {"offsets": (("a", "b"),)},
        {"offsets": (("a", 1, 2),)},
        {"arena_bytes": "many"},
    ],
)
def test_nonsense_is_refused(attrs: dict[str, Attr]) -> None:
    read = loop_groups if "loops" in attrs else planned_arena
    with pytest.raises(ProgramError):
        read(program(**attrs))
