"""The memory plan: nothing live overlaps, and equal layers get equal places."""

from __future__ import annotations

from hypothesis import given, settings

from infc.ir.program import Program
from infc.passes.base import PassContext
from infc.passes.group_loops import GroupLoops, loop_times
from infc.passes.plan_memory import Lifetime, PlanMemory, _place, is_view, lifetimes

from ..ir.strategies import programs
from .test_verification import model


def _plan(program: Program) -> tuple[dict[str, int], int]:
    planned = PlanMemory().run(program, PassContext()).program
    offsets, total = planned.attrs["offsets"], planned.attrs["arena_bytes"]
    assert isinstance(offsets, tuple)
    assert isinstance(total, int)
    places: dict[str, int] = {}
    for entry in offsets:
        assert isinstance(entry, tuple)
        name, offset = entry
        assert isinstance(name, str)
        assert isinstance(offset, int)
        places[name] = offset
    return places, total


def _last_reads(program: Program) -> dict[str, int]:
    """By another road than the pass: the last time the bytes of each value are read."""
    times = loop_times(program)
    roots: dict[str, str] = {}
    last: dict[str, int] = {}
    for node in program.nodes:
        source = node.values()[0].name if is_view(node.op) and node.values() else None
        for value in node.outputs:
            roots[value.name] = roots.get(source, value.name) if source else value.name
    for time, node in zip(times, program.nodes, strict=True):
        for value in (*node.values(), *node.outputs):
            root = roots.get(value.name, value.name)
            last[root] = max(last.get(root, 0), time)
    for value in program.outputs:
        last[roots.get(value.name, value.name)] = len(program.nodes)
    return last


@settings(max_examples=150)
@given(program=programs(max_nodes=20))
def test_nothing_live_overlaps(program: Program) -> None:
    program = GroupLoops().run(program, PassContext()).program
    offsets, total = _plan(program)
    last = _last_reads(program)
    lives = lifetimes(program)
    assert {life.name for life in lives} == set(offsets)
    for i, a in enumerate(lives):
        assert offsets[a.name] % 64 == 0
        assert offsets[a.name] + a.num_bytes <= total
        for b in lives[i + 1 :]:
            alive_together = b.first <= last[a.name] and a.first <= last[b.name]
            apart = (
                offsets[a.name] + a.num_bytes <= offsets[b.name]
                or offsets[b.name] + b.num_bytes <= offsets[a.name]
            )
            assert apart or not alive_together, f"%{a.name} and %{b.name} share bytes"


def test_equal_layers_get_equal_places() -> None:
    deep, shallow = model(12), model(6)
    assert _plan(deep)[1] == _plan(shallow)[1], "the arena does not grow with depth"
    offsets, _ = _plan(deep)
    assert offsets["out4"] == offsets["out6"] == offsets["out8"]


def test_sizes_are_those_of_the_upper_bounds() -> None:
    program = model(1)
    sizes = {life.name: life.num_bytes for life in lifetimes(program)}
    assert sizes["out0"] == 128 * 8 * 4


def test_what_lives_long_does_not_divide_the_memory_of_others() -> None:
    """Such as the angles of a step, which all layers read."""
    lives = [
        Lifetime("first", 128, 0, 1),
        Lifetime("angles", 64, 1, 9),
        Lifetime("larger", 256, 2, 3),
        Lifetime("last", 192, 3, 4),
    ]
    offsets, total = _place(lives, 64)
    assert total == 64 + 256 + 192
    assert offsets["angles"] == 0 and offsets["first"] == offsets["larger"] == 64
