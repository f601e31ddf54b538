"""Paged state: chunks, neighbours and freed blocks change nothing about what a sequence gets."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError
from infc.ir.interpret import interpret
from infc.ir.paged_state import PagedState
from infc.ir.program import Program, Value
from infc.ir.resources import KvGroup
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify

T = Sym("T")
BLOCK = 4
HEADS, GROUPS, SIZE, VALUE_SIZE = 4, 2, 8, 6
SHAPES = {"q": (HEADS, SIZE), "k": (GROUPS, SIZE), "v": (GROUPS, VALUE_SIZE)}


def builder(phase: str) -> ProgramBuilder:
    b = ProgramBuilder("state", phase=phase)
    b.symbol("T")
    for name, shape in SHAPES.items():
        b.input(name, TensorType(DType.F64, (T, *shape)))
    b.input("positions", TensorType(DType.I32, (T,)))
    for name in ("cos", "sin"):
        b.weight(name, TensorType(DType.F64, (64, SIZE // 2)))
    return b


Windows = list[int | None]
"""Of each layer. All attend to the keys and values of the first, whose results are added up."""


def captured(windows: Windows, softcap: float | None) -> Program:
    b = builder("captured")
    q, k, v, positions = b.inputs
    angles = _angles(b, positions)
    q, k = (b.emit("rope", x, *angles, rotary_dim=SIZE) for x in (q, k))
    attrs: dict[str, Any] = {"scale": 0.6, "softcap": softcap}
    results = [
        b.emit("attention", _query(b, q, layer), k, v, layer=layer, window=window, **attrs)
        for layer, window in enumerate(windows)
    ]
    b.output(_total(b, results))
    return b.build()


def _query(b: ProgramBuilder, q: Value, layer: int) -> Value:
    return b.emit("neg", q) if layer else q


def _total(b: ProgramBuilder, results: list[Value]) -> Value:
    return functools.reduce(lambda left, right: b.emit("add", left, right), results)


def widest(windows: Windows) -> int | None:
    return None if None in windows else max(window for window in windows if window is not None)


def _angles(b: ProgramBuilder, positions: Value) -> list[Value]:
    kind = TensorType(DType.F64, (64, SIZE // 2))
    return [b.emit("embedding", b.weight(name, kind), positions) for name in ("cos", "sin")]


def lowered(windows: Windows, softcap: float | None, fused: bool) -> Program:
    b = builder("lowered")
    window = widest(windows)
    b.resources = (KvGroup("kv", (0,), GROUPS, SIZE, VALUE_SIZE, "f64", BLOCK, window),)
    q, k, v, positions = b.inputs
    angles = _angles(b, positions)
    if fused:
        q = b.emit("rope_kv_write", q, k, v, *angles, layer=0, group="kv", rotary_dim=SIZE)
    else:
        q, k = (b.emit("rope", x, *angles, rotary_dim=SIZE) for x in (q, k))
        b.add("kv_write", (k, v), {"layer": 0, "group": "kv"})
    attrs: dict[str, Any] = {"scale": 0.6, "softcap": softcap, "value_head_dim": VALUE_SIZE}
    attrs |= {"cache": 0, "group": "kv"}
    results = [
        b.emit("paged_attention", _query(b, q, layer), layer=layer, window=window, **attrs)
        for layer, window in enumerate(windows)
    ]
    b.output(_total(b, results))
    return b.build()


def weights(name: str) -> torch.Tensor:
    angles = torch.arange(64, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.02])
    return angles.cos() if name == "cos" else angles.sin()


@dataclass
class Sequence:
    """One sequence: its data, its blocks, how far it got, what it was given."""

    inputs: dict[str, torch.Tensor]
    blocks: list[int]
    done: int
    outputs: list[torch.Tensor]

    @property
    def length(self) -> int:
        return len(self.inputs["positions"])


def make_sequence(length: int, blocks: list[int]) -> Sequence:
    inputs = {n: torch.randn(length, *s, dtype=torch.float64) for n, s in SHAPES.items()}
    inputs["positions"] = torch.arange(length, dtype=torch.int32)
    return Sequence(inputs, blocks, 0, [])


def run_step(
    program: Program, state: PagedState, batch: list[tuple[Sequence, int]], window: int | None
) -> None:
    """One ragged step: each sequence computes that many tokens more."""
    parts = [(s, s.done, s.done + count) for s, count in batch]
    tables = torch.zeros(len(parts), 8, dtype=torch.int32)
    for row, (s, begin, _) in enumerate(parts):
        tables[row, : len(s.blocks)] = torch.tensor(s.blocks)
        if window is not None:
            # What has left the window is freed: its entry is the null block.
            tables[row, : max(0, begin - window + 1) // BLOCK] = 0
    starts = torch.tensor([0, *(end - begin for _, begin, end in parts)]).cumsum(0)
    inputs = {
        name: torch.cat([s.inputs[name][begin:end] for s, begin, end in parts])
        for name in parts[0][0].inputs
    }
    lengths = torch.tensor([end for _, _, end in parts])
    state.set_step(inputs["positions"], starts, lengths, {"kv": tables})
    (out,) = interpret(program, inputs, weights, state)
    for row, (s, _, end) in enumerate(parts):
        s.outputs.append(out[int(starts[row]) : int(starts[row + 1])])
        s.done = end


@settings(max_examples=40)
@given(st.data())
def test_steps_give_what_one_whole_pass_gives(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    windows = data.draw(st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=3))
    softcap = data.draw(st.none() | st.just(2.0))
    whole, steps = captured(windows, softcap), lowered(windows, softcap, data.draw(st.booleans()))
    verify(whole)
    verify(steps)
    free = data.draw(st.permutations(range(1, 22)))
    sequences = [
        make_sequence(data.draw(st.integers(1, 24)), free[7 * i : 7 * i + 7]) for i in range(3)
    ]
    state = PagedState.allocate(steps.resources, 22)
    # Whatever is read without having been written makes the results NaN.
    for storage in (*state.keys.values(), *state.values.values()):
        storage.fill_(float("nan"))
    while left := [s for s in sequences if s.done < s.length]:
        chosen = data.draw(st.lists(st.sampled_from(left), min_size=1, unique_by=id))
        batch = [(s, data.draw(st.integers(1, s.length - s.done))) for s in chosen]
        run_step(steps, state, batch, widest(windows))
    for s in sequences:
        (wanted,) = interpret(whole, s.inputs, weights)
        torch.testing.assert_close(torch.cat(s.outputs), wanted)
    assert torch.isnan(state.keys[0][0]).all(), "the null block was written"
    assert len(state.keys) == 1, "only the first layer has a cache"


def test_given_slots_are_used() -> None:
    group = KvGroup("kv", (0,), 1, 2, 2, "f32", BLOCK)
    state = PagedState.allocate([group], 3)
    ones = torch.ones(1, 1, 2)
    zero = torch.tensor([0])
    state.set_step(zero, torch.tensor([0, 1]), torch.tensor([1]), {"kv": torch.tensor([[1]])})
    assert state.slots_of("kv", 0).tolist() == [BLOCK]
    state.slots = {"kv": torch.tensor([9])}
    state.write("kv", 0, ones, ones)
    assert state.keys[0].flatten(0, 2).sum(-1).nonzero().tolist() == [[9]]


def test_sinks_and_override_work_on_paged_state() -> None:
    b = ProgramBuilder("sinks", phase="lowered")
    b.symbol("T")
    b.resources = (KvGroup("kv", (0,), 1, 2, 2, "bf16", BLOCK),)
    q = b.input("q", TensorType(DType.BF16, (T, 1, 2)))
    sinks = b.weight("sinks", TensorType(DType.BF16, (1,)))
    b.add("kv_write", (q, q), {"layer": 0, "group": "kv"})
    b.output(b.emit("paged_attention", q, sinks, layer=0, group="kv", scale=1.0))
    program = b.build()
    state = PagedState.allocate(program.resources, 2, "f32")
    state.set_step(
        torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([1]), {"kv": torch.tensor([[1]])}
    )
    x = torch.tensor([[[1.0, 2.0]]])
    (out,) = interpret(program, {"q": x}, lambda _: torch.tensor([5.0]), state, "f32")
    torch.testing.assert_close(out, x * 0.5)  # the score is 5 as well: the sink takes half
    with pytest.raises(ProgramError, match="state"):
        interpret(program, {"q": x.bfloat16()}, lambda _: torch.tensor([5.0]))
