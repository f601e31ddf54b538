"""Differences between programs, artifacts and dumps: complete, folded, and none where none is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infc.driver.cli import run
from infc.driver.explain.compare import diff_paths, diff_programs
from infc.driver.explain.compare_text import render_diff
from infc.driver.explain.differences import ArtifactDiff, DumpsDiff, ProgramDiff
from infc.ir.program import Program
from infc.ir.text import parse_program, print_program
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import build_pipeline

from ...plans import PLAN
from .support import check_golden, stack, write_explained


@pytest.fixture(scope="module")
def plain(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model without the fusion of gated activations."""
    place = tmp_path_factory.mktemp("plain") / "plain"
    return write_explained(place, captured, passes={"fuse-gated-act": False})


def fused(layers: int) -> Program:
    """The stack of equal layers after the fuse phase."""
    pipeline = build_pipeline({"lower-kv": False, "plan-memory": False}, plan=PLAN)
    program, _ = run_pipeline(stack(layers), pipeline, verify=False)
    return program


def test_golden(update_golden: bool) -> None:
    before, after = stack(5), fused(5)
    text = render_diff(diff_programs(before, after))
    check_golden("stack.diff", text, update_golden)


@given(st.integers(1, 5), st.integers(1, 5))
def test_a_program_equals_itself_alone(a: int, b: int) -> None:
    diff = diff_programs(stack(a), stack(b))
    assert diff.equal == (a == b)
    assert (render_diff(diff) == "") == (a == b)


@given(st.integers(0, 6), st.integers(7, 9))
def test_turned_around_every_line_changes_sides(a: int, b: int) -> None:
    there, back = diff_programs(stack(a), stack(b)), diff_programs(stack(b), stack(a))
    turned = [(c.op, c.after, c.before) for c in back.ops]
    assert [(c.op, c.before, c.after) for c in there.ops] == turned
    assert (there.costs_before, there.costs_after) == (back.costs_after, back.costs_before)


def test_equal_layers_are_told_once() -> None:
    small, large = (diff_programs(stack(layers), fused(layers)) for layers in (4, 32))
    assert len(small.hunks) == len(large.hunks)
    assert sum(len(h.lines) for h in small.hunks) == sum(len(h.lines) for h in large.hunks)
    assert any("equal" in hunk.title for hunk in large.hunks)


def test_more_layers_are_more_of_the_same() -> None:
    diff = diff_programs(stack(4), stack(9))
    alone = [hunk for hunk in diff.hunks if "after alone" in hunk.title]
    assert len(alone) == 1
    assert "5 times" in alone[0].title


@settings(max_examples=20)
@given(st.integers(0, 4), st.sampled_from([0.02, 0.5]))
def test_one_attribute_of_one_layer_is_found(layer: int, value: float) -> None:
    program = stack(5)
    place = next(i for i, n in enumerate(program.nodes) if n.layer == layer and 0.01 in n.inputs)
    old = program.nodes[place]
    new = replace(old, inputs=(old.inputs[0], value))
    nodes = (*program.nodes[:place], new, *program.nodes[place + 1 :])
    diff = diff_programs(program, program.with_nodes(nodes))
    (hunk,) = diff.hunks
    assert re.match(rf"layer {layer}\b", hunk.title)
    changed = [line for line in hunk.lines if line[0] in "+-"]
    assert len(changed) == 2
    assert "0.01" in changed[0]
    assert str(value) in changed[1]


def test_renumbered_values_are_no_difference(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tiny / "program.ir").read_text()
    renamed = re.sub(r'(%|")(\d+)((?:\.[a-z]+)*)\b', r"\1n\2\3", text)
    renamed = re.sub(r"offsets = .*?\)\)", "offsets = ()", renamed)
    other = tmp_path / "other.ir"
    other.write_text(renamed)
    assert parse_program(renamed).nodes != parse_program(text).nodes
    assert run(["diff", str(tiny), str(other)]) == 0
    assert capsys.readouterr().out == ""


def test_artifacts_differ_in_a_pass(tiny: Path, plain: Path) -> None:
    diff = diff_paths(tiny, plain)
    assert isinstance(diff, ArtifactDiff)
    assert not diff.equal
    assert [(c.name, c.after) for c in diff.recipe] == [("passes.fuse-gated-act", "false")]
    assert diff.passes[0].name == "fuse-gated-act"
    assert diff.passes[0].after is None
    assert diff.same_passes > 0
    assert diff.captured is not None
    assert diff.captured.equal
    assert diff.final is not None
    changes = {change.op: change.after - change.before for change in diff.final.ops}
    assert changes["gated_act"] == -6
    assert changes["silu"] == 6
    assert diff.final.costs_after.decode.bytes_read > diff.final.costs_before.decode.bytes_read
    text = render_diff(diff)
    for part in (
        "recipe",
        "passes.fuse-gated-act",
        "- fuse-gated-act",
        "@@ layers 1-4: 4 equal @@",
    ):
        assert part in text
    assert "@@" not in render_diff(diff, stat=True)


def dump(directory: Path, **passes: bool) -> Path:
    """The dumps of every pass over the stack of equal layers."""
    pipeline = build_pipeline({"lower-kv": False, "plan-memory": False, **passes}, plan=PLAN)
    run_pipeline(stack(4), pipeline, verify=False, dump_ir_after="all", dump_directory=directory)
    return directory


def test_dumps_differ_pass_by_pass(tmp_path: Path) -> None:
    dumps = dump(tmp_path / "with")
    assert diff_paths(dumps, dumps).equal
    diff = diff_paths(dumps, dump(tmp_path / "without", **{"fuse-gated-act": False}))
    assert isinstance(diff, DumpsDiff)
    assert not diff.equal
    names = [stage.name for stage in diff.stages]
    at = names.index("fuse-gated-act")
    assert diff.stages[at].only_before
    assert all(stage.equal for stage in diff.stages[:at])
    assert not any(stage.equal for stage in diff.stages[at:])
    text = render_diff(diff, stat=True)
    assert "== fuse-gated-act: before alone ==" in text
    assert "== merge-gate-up: equal ==" in text


def test_the_command(tiny: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", str(tiny), str(tiny)]) == 0
    assert capsys.readouterr().out == ""
    assert run(["diff", str(tiny), str(plain), "--stat"]) == 1
    assert "final program" in capsys.readouterr().out
    assert run(["diff", f"{tiny}:captured", f"{tiny}:final", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["nodes_before"] > document["nodes_after"]
    assert run(["diff", f"{tiny}:captured", str(tiny / "captured.ir")]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["gone.ir", "gone.ir"], 2, "gone.ir: cannot be read: No such file"),
        (["TINY", "nothing"], 7, "nothing: the artifact does not exist"),
        (["empty", "empty"], 2, "empty: neither an artifact nor dumps of IR text"),
        (["bad.ir", "bad.ir"], None, "bad.ir:1"),
        (["bytes.ir", "bytes.ir"], 2, "bytes.ir: not UTF-8 text"),
        (["TINY:fused", "TINY"], 2, "no program or stage 'fused'"),
        (["dumps", "TINY"], 2, "a directory of dumps can only be compared with another one"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    status: int | None,
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps/00-first.ir").write_text(print_program(stack(1)))
    (tmp_path / "bad.ir").write_text("program {")
    (tmp_path / "bytes.ir").write_bytes(b"\xff\xfe")
    found = run(["diff", *(text.replace("TINY", str(tiny)) for text in arguments)])
    assert found == status if status is not None else found > 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: {message}")


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 4))
def test_what_a_diff_counts_is_what_there_is(layers: int) -> None:
    before, after = stack(layers), fused(layers)
    diff: ProgramDiff = diff_programs(before, after)
    gained = sum(change.after - change.before for change in diff.ops)
    assert diff.nodes_after - diff.nodes_before == gained == len(after.nodes) - len(before.nodes)
