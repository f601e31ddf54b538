"""Launches that stand for several nodes: fewer of them, and what the nodes mean one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infc.codegen.triton import apart, fusions
from infc.codegen.triton.backend import generate
from infc.ir.launches import Form
from infc.ir.program import Attr, Program
from infc.ir.weights import program_weights
from infc.runtime.scheduling.step import StepOutput

from ..harness import Chunk, make_step, random_weights, with_weights
from .emulating import Emulating
from .interpreting import Interpreting
from .running import TARGET, Carrier, Runner
from .shapes import Shape, layer
from .test_launches import plan

BLOCK_SIZE = 32
SMALL = Shape(144, 4, 2, 16, 72, 96, 256)


def program_of(*, early: bool = False) -> Program:
    """A layer whose sizes no tile divides; with `early`, norms round before their weights."""
    program = layer(SMALL)
    nodes = tuple(
        replace(node, attrs={**node.attrs, "round_before_scale": early})
        if "round_before_scale" in node.attrs
        else node
        for node in program.nodes
    )
    program = replace(program, nodes=nodes)
    weights = random_weights(program, seed=4)
    return with_weights(plan(program), {name: one * 0.5 for name, one in weights.items()})


def outputs(program: Program, process: Carrier, place: Path | None = None) -> Sequence[StepOutput]:
    """A prompt of three sequences, a token of each behind it, and a token of the last alone."""
    runner = Runner(program, program_weights(program), process)
    if isinstance(process, Emulating):
        assert place is not None
        process.compile(runner.made.codes, place)
    chunks = [Chunk([5, 6, 7, 8], 0, [3]), Chunk([9, 10], 0, [1]), Chunk([11], 0, [2])]
    runner.run(make_step(chunks, num_groups=1, block_size=BLOCK_SIZE))
    more = [Chunk([12], 4, [3]), Chunk([13], 2, [1]), Chunk([14], 1, [2])]
    pages = dict(runner.pages)
    step = make_step(more, num_groups=1, block_size=BLOCK_SIZE)
    found = [runner.run(replace(step, wants_hidden=True), "decode-16")]
    runner.pages = pages
    alone = make_step(more[2:], num_groups=1, block_size=BLOCK_SIZE)
    return [*found, runner.run(replace(alone, wants_hidden=True), "decode-16")]


def check_same(found: Sequence[StepOutput], wanted: Sequence[StepOutput], bound: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        error = np.abs(one.logits - other.logits).max() / np.abs(other.logits).max()
        assert error < bound
    assert np.array_equal(found[0].logits[2], found[1].logits[0]), "a row depends on the batch"
    assert found[0].hidden is not None and found[1].hidden is not None
    assert np.array_equal(found[0].hidden[2], found[1].hidden[0])


@pytest.mark.parametrize("early", [pytest.param(False, marks=pytest.mark.breadth), True])
def test_fused_launches_mean_what_single_nodes_mean(
    early: bool, interpreting: Interpreting, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(early=early)
    found = outputs(program, interpreting)
    monkeypatch.setattr(fusions, "_FUSIONS", {})
    check_same(found, outputs(program, interpreting), 1e-2)


def test_compiled_fused_launches_mean_the_same(interpreting: Interpreting, tmp_path: Path) -> None:
    program = program_of()
    found = outputs(program, Emulating(), tmp_path)
    check_same(found, outputs(program, interpreting), 1e-2)


def decode_form(program: Program) -> tuple[Form, list[str]]:
    made = generate(program, TARGET)
    form = next(form for form in made.forms if form.name == "decode-16")
    names = [made.codes[one.kernel].function for one in form.launches]
    return form, names


def test_a_layer_is_six_launches() -> None:
    _, names = decode_form(program_of())
    first = names.index("normed_linear")
    assert names[first : first + 6] == [
        *("normed_linear", "rope_kv_write", "attend_splits", "linear", "normed_linear", "linear")
    ]


def test_a_launch_writes_nowhere_where_it_reads(
    interpreting: Interpreting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of single nodes may have a sum over the rows of the product that it adds to."""
    program = program_of()
    wanted = outputs(program, interpreting)
    (attention,) = (node for node in program.nodes if node.op == "paged_attention")
    total = next(node for node in program.nodes if node.op == "add_rms_norm").outputs[1]
    offsets, arena = program.attrs["offsets"], program.attrs["arena_bytes"]
    assert isinstance(offsets, tuple) and isinstance(arena, int)
    behind: dict[str, Attr] = {attention.output.name: arena, total.name: arena}
    kept = [pair for pair in offsets if isinstance(pair, tuple) and pair[0] not in behind]
    attrs: dict[str, Attr] = {"offsets": (*kept, *behind.items()), "arena_bytes": arena + (1 << 22)}
    moved = replace(program, attrs={**program.attrs, **attrs})
    for one, other in zip(outputs(moved, interpreting), wanted, strict=True):
        assert np.array_equal(one.logits, other.logits)
    monkeypatch.setattr(apart, "_overlap", lambda *given: False)
    wrong = outputs(moved, interpreting)
    assert not np.array_equal(wrong[0].logits, wanted[0].logits), "the places do not matter here"
