"""Attention over pages in tiles and in splits, over contexts of several splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import DeviceError
from infc.ir.interpret import interpret
from infc.ir.paged_state import PagedState
from infc.ir.program import Program, WeightRef
from infc.ir.resources import KvGroup
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights

from ..harness import Chunk, make_step, random_weights, with_weights
from .emulating import Emulating
from .interpreting import Interpreting
from .running import Runner, tensor_bytes

VOCAB, BLOCK = 40, 16
CONTEXT = 600
BLOCKS = tuple(np.random.default_rng(1).permutation(40)[:38] + 1)


def attention(
    heads: int, groups: int, sizes: tuple[int, int], *, sinks: bool, **limits: Any
) -> Program:
    """One layer over a cache in float32; rows of tables are its queries, keys and values."""
    size, value_size = sizes
    b = ProgramBuilder("attention", phase="planned")
    b.symbol("T", 1, 256)
    b.symbol("R", 1, 4)
    ids, positions = (
        b.input(name, TensorType(DType.I64, (Sym("T"),))) for name in ("input_ids", "positions")
    )
    b.resources = (KvGroup("kv", (0,), groups, size, value_size, "f32", BLOCK),)
    q, k, v = (
        b.emit(
            "reshape",
            b.emit("embedding", b.weight(name, TensorType(DType.F32, (VOCAB, each * width))), ids),
            shape=("T", each, width),
        )
        for name, each, width in (
            ("q", heads, size),
            ("k", groups, size),
            ("v", groups, value_size),
        )
    )
    frequencies = b.weight("frequencies", TensorType(DType.F32, (4,)))
    turns = [b.emit("rotary", positions, frequencies, function=name) for name in ("cos", "sin")]
    place: dict[str, Any] = {"layer": 0, "group": "kv"}
    q = b.emit("rope_kv_write", q, k, v, *turns, rotary_dim=8, style="interleaved", **place)
    more: list[WeightRef] = [b.weight("sinks", TensorType(DType.F32, (heads,)))] if sinks else []
    options = {"value_head_dim": value_size, "scale": 0.15, **limits}
    y = b.emit("paged_attention", q, *more, **place, **options)
    b.output(logits=b.emit("reshape", y, shape=("T", heads * value_size)))
    program = b.build()
    spec = replace(program.spec, vocab_size=heads * value_size, max_context=CONTEXT)
    program = replace(program, spec=spec)
    return with_weights(program, random_weights(program, seed=9))


CASES = {
    "plain": attention(4, 2, (20, 12), sinks=False),
    "window": attention(4, 1, (16, 24), sinks=True, window=70),
    "softcap": attention(3, 3, (9, 9), sinks=True, softcap=2.0),
    "long-window": attention(2, 1, (8, 8), sinks=False, window=300),
}


def store(runner: Runner, state: PagedState, length: int) -> None:
    """Give the runner's pages what the state has of a sequence's first positions."""
    (group,) = runner.program.resources
    assert isinstance(group, KvGroup)
    parts = []
    for stored in (state.keys[0], state.values[0]):
        held = stored.clone()
        for place, block in enumerate(BLOCKS):
            held[block, max(0, length - place * BLOCK) :] = torch.nan
        held[[0, *sorted({*range(41)} - {*BLOCKS})]] = torch.nan
        parts.append(held.transpose(1, 2).reshape(len(held), -1))
    pages = torch.cat(parts, 1)
    assert pages.shape[1] * 4 == group.bytes_per_block()
    runner.pages["kv"] = tensor_bytes(pages)


SOME = ("window", "softcap")
MARKED = [name if name in SOME else pytest.param(name, marks=pytest.mark.breadth) for name in CASES]


@pytest.mark.parametrize("name", MARKED)
def test_contexts_of_several_splits(name: str, interpreting: Interpreting) -> None:
    """A chunk in tiles behind what was stored, then a token in splits and the same in a tile."""
    program = CASES[name]
    check_contexts(program, Runner(program, program_weights(program), interpreting, num_blocks=41))


def test_compiled_splits_are_merged_by_the_last_of_them(tmp_path: Path) -> None:
    """The same in the emulation, which counts the splits that have arrived as a GPU does."""
    program, process = CASES["softcap"], Emulating()
    runner = Runner(program, program_weights(program), process, num_blocks=41)
    process.compile(runner.made.codes, tmp_path)
    check_contexts(program, runner)


def uncounted(source: str) -> str:
    """Without the order between splits that counting gives."""
    return source.replace("atom.global.gpu.acq_rel", "atom.global.gpu.relaxed")


def unordered(source: str) -> str:
    """Without the barrier between what a split stores and its counting."""
    head, atomic, rest = source.partition("atom.global")
    before, barrier, after = head.rpartition("bar.sync")
    return f"{before}// {barrier}{after}{atomic}{rest}" if atomic else source


@pytest.mark.parametrize("change", [uncounted, unordered])
def test_splits_that_do_not_wait_for_each_other_are_noticed(
    change: Callable[[str], str], tmp_path: Path
) -> None:
    program, process = CASES["softcap"], Emulating(change=lambda _, text: change(text))
    runner = Runner(program, program_weights(program), process, num_blocks=41)
    process.compile(runner.made.codes, tmp_path)
    with pytest.raises(DeviceError, match=r"attention\.py:\d+:\d+.*race: the (read|write) "):
        check_contexts(program, runner)


def check_contexts(program: Program, runner: Runner) -> None:
    weights = program_weights(program)
    (node,) = (node for node in program.nodes if node.op == "paged_attention")
    window = node.attrs["window"]
    assert window is None or isinstance(window, int)
    ids = np.random.default_rng(6).integers(0, VOCAB, 560)
    state = PagedState.allocate(program.resources, 41)
    for first, last in ((0, 250), (250, 500), (500, 517), (517, 518)):
        positions = torch.arange(first, last)
        state.set_step(
            *(positions, torch.tensor([0, last - first]), torch.tensor([last])),
            {"kv": torch.tensor([BLOCKS])},
        )
        inputs = {"input_ids": torch.tensor(ids[first:last]), "positions": positions}
        (wanted,) = interpret(program, inputs, weights, state)
        if last <= 500:
            store(runner, state, last)
            continue
        # What has left every window was freed: block 0 is never read.
        kept = 0 if window is None else max(0, first - window + 1)
        blocks = [0 if (i + 1) * BLOCK <= kept else block for i, block in enumerate(BLOCKS)]
        chunk = Chunk(ids[first:last].tolist(), first, blocks)
        step = make_step([chunk], num_groups=1, block_size=BLOCK)
        for form in ("decode-4", "mixed-64") if last - first == 1 else (None,):
            found = runner.run(step, form).logits
            error = np.abs(found - wanted.numpy()).max() / wanted.abs().max()
            assert error < 1e-5, (first, form)


@pytest.mark.parametrize("form", ["decode-4", "mixed-64"])
def test_padding_stores_and_reads_nothing(form: str, interpreting: Interpreting) -> None:
    """A row with slot -1 and context 0, as captured steps have them."""
    program = CASES["plain"]
    runner = Runner(program, program_weights(program), interpreting, num_blocks=41)
    chunks = [Chunk([3], 0, [1]), Chunk([4], 0, [2])]
    step = make_step(chunks, num_groups=1, block_size=BLOCK)
    alone = make_step(chunks[:1], num_groups=1, block_size=BLOCK)
    padded = replace(
        step,
        slots=(np.array([BLOCK, -1], np.int32),),
        context_lengths=np.array([1, 0], np.int32),
        block_tables=(np.array([[1], [0]], np.int32),),
    )
    found = runner.run(padded, form).logits
    pages = runner.pages["kv"].reshape(41, -1)
    assert (pages[[0, *range(2, 41)]] == 0xFF).all(), "padding was stored"
    assert np.array_equal(found[0], runner.run(alone, form).logits[0])
    assert (found[1] == 0).all()
