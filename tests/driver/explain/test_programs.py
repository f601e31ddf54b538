"""What inspecting and comparing say of programs beside the model's step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infc.driver.cli import run
from infc.driver.explain.collect import inspect_artifact, read_program
from infc.driver.explain.compare import diff_paths
from infc.driver.explain.compare_text import render_diff
from infc.driver.explain.differences import ArtifactDiff, ProgramDiff
from infc.driver.explain.document import artifact_json
from infc.driver.explain.programs_text import render_programs
from infc.driver.explain.text import render_artifact
from infc.ir.artifact import open_artifact
from infc.ir.builder import ProgramBuilder
from infc.ir.program import Program
from infc.ir.text import print_program
from infc.ir.types import DType, Sym, TensorType

from ...codegen.harness import build, random_weights, with_weights
from ...codegen.test_further import program as main_program
from ...runtime.small_artifact import write_small_artifact


def head(op: str = "silu") -> Program:
    """Rows of 24 through one op and a matrix."""
    b = ProgramBuilder("head", phase="lowered")
    b.symbol("R", 1, 8)
    rows = b.input("states", TensorType(DType.F32, (Sym("R"), 24)))
    b.layer = 0
    weight = b.weight("w", TensorType(DType.F32, (40, 24)))
    b.output(logits=b.emit("linear", b.emit(op, rows), weight))
    return with_weights(b.build(), random_weights(b.build(), 1))


def made(path: Path, **beside: Program) -> Path:
    return build(main_program(), path, backend="reference", beside=beside).path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("two") / "two", head=head())


def test_each_has_its_facts(two: Path) -> None:
    facts = inspect_artifact(two, memory=1 << 30)
    (other,) = facts.others
    assert (other.name, other.num_tensors, other.num_shared) == ("head", 1, 0)
    assert other.weights_bytes > 40 * 24 * 4
    assert other.handed_over_bytes == 8 * 40 * 4
    assert other.program is not None
    assert [op.op for op in other.program.ops] == ["linear", "silu"]
    data = json.loads(artifact_json(facts))
    assert data["others"][0]["name"] == "head"
    assert data["manifest"]["programs"]["head"]["inputs"] == {"states": "f32[R, 24]"}


def test_the_report_has_all(two: Path) -> None:
    facts = inspect_artifact(two, memory=1 << 30)
    text = render_programs(facts)
    assert text.startswith(render_artifact(facts))
    lines = [line.split() for line in text.splitlines()]
    table = lines.index(["programs"])
    assert [line[0] for line in lines[table + 2 : table + 5]] == ["main", "head", "in"]
    assert "== head ==" in text
    assert "inputs   states f32[R, 24]" in text
    assert "limits   R to 8\n" in text
    assert "weights  " in text and "0 of 1 tensor in the file of the main program" in text
    alone = inspect_artifact(open_artifact(two).path, memory=1 << 30)
    assert render_programs(replace(alone, others=())) == render_artifact(alone)


def test_the_text_of_each(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, expected in [("head", head()), ("head:final", head()), ("final", main_program())]:
        assert run(["inspect", str(two), "--program", stage]) == 0
        assert capsys.readouterr().out == print_program(expected)
        assert read_program(open_artifact(two), stage) == expected
    for stage, message in [
        (
            "heda",
            "no program or stage 'heda' (did you mean 'head'? it has main and head, each with"
            " captured and final;",
        ),
        ("final1", "no program or stage 'final1' (did you mean 'final'? it has main and head,"),
        ("tail", "no program or stage 'tail' (it has main and head, each with captured and"),
        ("hed:final", "no program 'hed' (did you mean 'head'? it has main and head, each with"),
        ("head:capture", "no stage 'capture' of head (did you mean 'captured'? it has main and"),
        (":first", "no program or stage ':first' (it has main and head,"),
        ("head:captured", "it contains no programs/head/captured.ir"),
    ]:
        assert run(["inspect", str(two), "--program", stage]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_each_is_compared(two: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other", head=head("relu"))
    found = diff_paths(two, other)
    assert isinstance(found, ArtifactDiff) and not found.equal
    assert found.final is not None and found.final.equal
    (changed,) = found.others
    assert (changed.name, changed.only, changed.captured) == ("head", None, None)
    assert changed.final is not None
    assert [one.op for one in changed.final.ops] == ["relu", "silu"]
    assert "== final program head ==" in render_diff(found)
    one = diff_paths(f"{two}:head", f"{other}:head:final")
    assert isinstance(one, ProgramDiff) and one == changed.final


def test_one_that_the_other_lacks(two: Path, tmp_path: Path) -> None:
    plain = made(tmp_path / "plain")
    found = diff_paths(two, plain)
    assert isinstance(found, ArtifactDiff)
    assert [(one.name, one.only) for one in found.others] == [("head", "before")]
    assert "== program head: before alone ==" in render_diff(found)
    assert not any("head" in change.name for change in found.manifest)
    back = diff_paths(plain, two)
    assert isinstance(back, ArtifactDiff)
    assert [(one.name, one.only) for one in back.others] == [("head", "after")]


def test_an_artifact_with_one_program_is_told_as_before(tmp_path: Path) -> None:
    facts = inspect_artifact(write_small_artifact(tmp_path / "small"), memory=1 << 30)
    assert facts.others == ()
    assert render_programs(facts) == render_artifact(facts)
