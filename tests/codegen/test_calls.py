"""Barriers and rolling: what is executed must not change, only how it is written."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from infc.codegen.cpp.calls import (
    BARRIER,
    ArenaPtr,
    Call,
    Const,
    Panels,
    Span,
    WeightPtr,
    applied,
    place_barriers,
    read_ahead,
)
from infc.codegen.cpp.roll import Item, Loop, roll

spans = st.builds(
    lambda start, size: Span("arena", start, start + size), st.integers(0, 12), st.integers(1, 4)
)
touching = st.builds(
    lambda reads, writes, rows: Call(("f();",), tuple(reads), tuple(writes), rows=rows),
    st.lists(spans, max_size=2),
    st.lists(spans, min_size=1, max_size=2),
    st.sampled_from(["", "3", "6"]),
)


def touched(call: Call, spans: tuple[Span, ...], thread: int) -> set[int]:
    """The bytes of spans that a thread of two touches: all, or its half of the rows, in units of
    a sixth of a byte."""
    found: set[int] = set()
    for span in spans:
        units = range(span.start * 6, span.stop * 6)
        if call.rows:
            rows = int(call.rows)
            row = len(units) // rows
            first, last = thread * rows // 2 * row, (thread + 1) * rows // 2 * row
            units = units[first:last]
        found.update(units)
    return found


def conflicts(a: Call, b: Call) -> bool:
    """Whether one thread's share of two calls may not run beside another's of the first."""
    for mine, other in ((0, 1), (1, 0)):
        written, read = touched(a, a.writes, other), touched(a, a.reads, other)
        if touched(b, b.writes, mine) & (written | read) or touched(b, b.reads, mine) & written:
            return True
    return False


@given(st.lists(touching, max_size=12))
def test_calls_between_barriers_never_conflict(calls: list[Call]) -> None:
    placed = place_barriers(calls)
    assert [call for call in placed if call is not BARRIER] == calls
    stretch: list[Call] = []
    for call in placed:
        if call is BARRIER:
            assert stretch, "a barrier that waits for nothing"
            stretch = []
            continue
        assert not any(conflicts(earlier, call) for earlier in stretch)
        stretch.append(call)


def test_rows_that_a_thread_made_itself_need_no_barrier() -> None:
    x, y, z = (Span("arena", at, at + 64) for at in (0, 64, 128))
    norm = Call(("norm();",), (x,), (y,), rows="T")
    quantize = Call(("quantize();",), (y,), (z,), rows="T")
    assert place_barriers([norm, quantize]) == [norm, quantize]
    for other in (replace(quantize, rows="R"), replace(quantize, rows="")):
        assert place_barriers([norm, other]) == [norm, BARRIER, other]
    elsewhere = replace(quantize, writes=(Span("arena", 8, 40),))
    assert place_barriers([norm, elsewhere]) == [norm, BARRIER, elsewhere]


@given(st.lists(st.booleans(), max_size=12))
def test_each_product_is_announced_behind_the_one_before(products: list[bool]) -> None:
    calls = []
    for number, is_product in enumerate(products):
        panels = Panels("bf16", WeightPtr("char", number), 64, 32)
        calls.append(Call((f"f{number}();",), (), (), panels=panels if is_product else None))
    written = read_ahead(calls)
    assert [call for call in written if call in calls] == calls
    announced = None
    for call in written:
        if call not in calls:
            (announced,) = (arg for arg in call.code if isinstance(arg, WeightPtr))
            assert call.code == (
                *("ahead = ", "panels_ahead<bf16>(", "t", ", ", announced, ", ", "T"),
                *(", ", Const(64), ", ", Const(32), ")", ";"),
            )
        elif call.panels is not None:
            assert announced == call.panels.weight
            announced = None
    first = next((call.panels.weight for call in calls if call.panels is not None), None)
    assert announced == first


def unroll(items: list[Item]) -> list[list[object]]:
    """The statements that a rolled program executes, with the values of their addresses."""
    result: list[list[object]] = []
    for item in items:
        if isinstance(item, Call):
            result.append([_entry(arg) for arg in item.code])
            continue
        for row in item.rows:
            for number, call in enumerate(item.body):
                values = [_entry(arg) for arg in call.code]
                for column, (body_call, place) in enumerate(item.columns):
                    if body_call == number:
                        values[place] = row[column]
                result.append(values)
    return result


def _entry(arg: object) -> object:
    match arg:
        case Const(value):
            return value
        case ArenaPtr(_, offset):
            return offset
        case WeightPtr(_, index, offset):
            return index << 40 | offset
    return arg


calls = st.builds(
    lambda name, args: Call((*applied(name, *args), ";"), (), ()),
    st.sampled_from("abc"),
    st.lists(
        st.one_of(
            st.builds(Const, st.integers(0, 3)),
            st.builds(ArenaPtr, st.sampled_from(["float", "bf16"]), st.integers(0, 3)),
            st.builds(WeightPtr, st.just("bf16"), st.integers(0, 3), st.integers(0, 3)),
            st.sampled_from(["T", "R"]),
        ),
        max_size=2,
    ),
)


@given(st.lists(calls, max_size=30))
def test_rolling_keeps_what_is_executed(program: list[Call]) -> None:
    assert unroll(roll(program)) == unroll(list(program))


@given(st.lists(calls, min_size=3, max_size=6), st.integers(3, 12))
def test_equal_layers_become_one_loop(layer: list[Call], count: int) -> None:
    layers = layer * count
    items = roll(layers)
    size = sum(len(item.body) if isinstance(item, Loop) else 1 for item in items)
    assert size <= 2 * len(layer)
