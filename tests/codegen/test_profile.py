"""The profile of a step: each statement has an entry, named, and counted when it runs."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.codegen.cpp.calls import BARRIER, Call, Const, applied
from infc.codegen.cpp.profile import num_entries, profile_text
from infc.codegen.cpp.roll import roll
from infc.codegen.cpp.source import source_text
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ArtifactError
from infc.ir.program import Program
from infc.ir.types import DType
from infc.runtime.executors.base import run_step

from .harness import Chunk, build, make_step, open_cpp, random_weights, with_weights
from .op_cases import WIDTH, Case

LAYERS = 6


def layered() -> Program:
    """Equal layers of a loop and a product, so that they are rolled up, and a norm behind them."""
    c = Case(DType.F32)
    y = c.x
    for layer in range(LAYERS):
        y = c.op("linear", c.op("tanh", y), c.weight(f"w{layer}", WIDTH, WIDTH))
        y = c.op("mul", c.op("sigmoid", y), c.op("sum", y, dims=(1,), keepdim=True))
    c.b.outputs = [c.op("rms_norm", y, c.weight("norm", WIDTH), eps=1e-5)]
    program = c.b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=WIDTH))
    return with_weights(program, random_weights(program, seed=1))


def test_every_statement_is_named_timed_and_counted(tmp_path: Path) -> None:
    program = layered()
    artifact = build(program, tmp_path / "a")
    step = make_step([Chunk([1, 2, 3], 0, [1])], num_groups=0, block_size=16)
    executor = open_cpp(artifact, profile=True)
    start = time.perf_counter_ns()
    for _ in range(3):
        run_step(executor, step)
    took = time.perf_counter_ns() - start
    entries = executor.profile()
    assert 0 < sum(entry.nanoseconds for entry in entries) < took
    assert all(entry.nanoseconds > 0 for entry in entries)
    linear = next(entry for entry in entries if entry.name == "linear")
    assert linear.count == 3 * LAYERS
    assert list(linear.nodes) == [n.output.name for n in program.nodes if n.op == "linear"]
    assert [(e.name, e.count) for e in entries if e.name in ("rms_norm", "logits")] == [
        ("rms_norm", 3),
        ("logits", 3),
    ]
    named = [label for entry in entries for label in entry.nodes]
    assert sorted(named) == sorted(node.output.name for node in program.nodes)


def test_measuring_changes_no_bit_and_is_off_by_default(tmp_path: Path) -> None:
    artifact = build(layered(), tmp_path / "a")
    step = make_step([Chunk([4, 5], 0, [1])], num_groups=0, block_size=16)
    measured, plain = open_cpp(artifact, profile=True), open_cpp(artifact)
    assert np.array_equal(run_step(measured, step).logits, run_step(plain, step).logits)
    assert plain.profile() == []
    assert measured.profile()[0].count == 1


def test_names_that_are_not_of_the_library_are_refused(tmp_path: Path) -> None:
    artifact = build(layered(), tmp_path / "a")
    names = artifact.path / "code" / "profile.json"
    entries = json.loads(names.read_text())["entries"]
    names.write_text(json.dumps({"entries": entries[1:]}))
    with pytest.raises(ArtifactError, match=f"names {len(entries) - 1} entries"):
        open_cpp(artifact, profile=True)
    assert open_cpp(artifact).profile() == []


statements = st.one_of(
    st.just(BARRIER),
    st.just(Call(("if (logits == nullptr) return;",), (), ())),
    st.builds(
        lambda name, value, label: Call(
            (*applied(name, Const(value)), ";"), (), (), comment=name, nodes=(label,)
        ),
        st.sampled_from("abc"),
        st.integers(0, 3),
        st.text("xyz", min_size=1, max_size=2),
    ),
)


@given(st.lists(statements, max_size=30))
def test_marks_follow_the_entries_and_keep_every_label(calls: list[Call]) -> None:
    items = roll(calls)
    text = source_text(ProgramBuilder("p").build(), items, num_weights=0, arena_bytes=0)
    entries = json.loads(profile_text(items))["entries"]
    marks = re.findall(r"(\w+)\(.*?\);  clock\.mark\((\d+)\);", text)
    assert [int(number) for _, number in marks] == list(range(num_entries(items)))
    assert [name for name, _ in marks] == [entry["name"] for entry in entries]
    labels = sorted(label for entry in entries for label in entry["nodes"])
    assert labels == sorted(label for call in calls for label in call.nodes)
