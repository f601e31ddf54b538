"""The plan is read back as it was written, and nonsense in its place is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError
from infc.ir.plan import Arena, loop_groups, planned_arena
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
