"""Barriers and rolling: what is executed must not change, only how it is written."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from infc.codegen.cpp.calls import BARRIER, ArenaPtr, Call, Const, Span, WeightPtr, place_barriers
from infc.codegen.cpp.roll import Item, Loop, roll

spans = st.builds(
    lambda start, size: Span("arena", start, start + size), st.integers(0, 12), st.integers(1, 4)
)
touching = st.builds(
    lambda reads, writes: Call("f();", (), tuple(reads), tuple(writes)),
    st.lists(spans, max_size=2),
    st.lists(spans, min_size=1, max_size=2),
)


def conflicts(a: Call, b: Call) -> bool:
    """Whether two calls may not run at the same time."""
    pairs = [(x, y) for x in a.writes for y in (*b.reads, *b.writes)]
    pairs += [(x, y) for x in a.reads for y in b.writes]
    return any(x.overlaps(y) for x, y in pairs)


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


def unroll(items: list[Item]) -> list[tuple[str, list[object]]]:
    """The statements that a rolled program executes, with the values of their arguments."""
    result: list[tuple[str, list[object]]] = []
    for item in items:
        if isinstance(item, Call):
            result.append((item.template, [_entry(arg) for arg in item.args]))
            continue
        for row in item.rows:
            for number, call in enumerate(item.body):
                values = [_entry(arg) for arg in call.args]
                for column, (body_call, place) in enumerate(item.columns):
                    if body_call == number:
                        values[place] = row[column]
                result.append((call.template, values))
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
    lambda name, args: Call(
        f"{name}({', '.join(f'{{{i}}}' for i in range(len(args)))});", tuple(args), (), ()
    ),
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
