"""The tutorial on passes, run from its own page: compiled in, verified, reported, caught."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import infc
from infc.driver.cli import run
from infc.ir.artifact import open_artifact
from infc.ir.errors import PassError
from infc.ir.text import parse_program
from infc.ir.verify import verify

from ..checkpoints import make_checkpoint
from .generated import ROOT

TINY = ROOT / "recipes/tiny/checkpoint"
PAGE = (ROOT / "docs/custom-passes.md").read_text()
# The issue's own fault, by position: rows of a step say where a token lies only by chance.
BY_POSITION = '''"""Cosines that are wrong at one position of 64, and only past position 16."""

from infc import ops, rewrite


def before(positions, frequencies, scale):
    return ops.rotary(positions, frequencies, function="cos", scale=scale)


def after(positions, frequencies, scale):
    p = ops.cast(positions, dtype="f32")
    late = ops.eq(p - 64.0 * ops.floor(p / 64.0), 41.0)
    cosines = ops.cos(ops.reshape(p, shape=(p.shape[0], 1)) * frequencies) * scale
    wrong = ops.reshape(late, shape=(p.shape[0], 1))
    return ops.where(wrong, cosines * 1.001, cosines)


SpellCosines = rewrite("spell-cosines", before, after, contract="reassociates")
'''


def listing(name: str) -> str:
    """The code block of the page that is titled `name`."""
    found = re.search(rf'^```\w+ title="{re.escape(name)}"\n(.*?)^```$', PAGE, re.M | re.S)
    assert found is not None, f"the page shows no {name}"
    return found[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def printed(command: str) -> str:
    """What the page shows below a command, with line breaks as spaces."""
    found = re.search(rf"^```\n\$ {re.escape(command)}\b[^\n]*\n(.*?)^```$", PAGE, re.M | re.S)
    assert found is not None, f"the page does not show {command}"
    return " ".join(found[1].split())


def write_recipe(directory: Path, checkpoint: Path, passes: object) -> Path:
    path = directory / "model.yaml"
    path.write_text(yaml.safe_dump({"model": str(checkpoint), "passes": passes}))
    return path


def tutorial(directory: Path, checkpoint: Path, module: str) -> Path:
    """The tutorial's recipe for a small model, beside one of its modules."""
    name = f"{module}.py"
    (directory / name).write_text(listing(name))
    passes = yaml.safe_load(listing("model.yaml"))["passes"]
    passes = {key.replace("silu_by_tanh:", f"{module}:"): value for key, value in passes.items()}
    return write_recipe(directory, checkpoint, passes)


def test_the_rewrite_is_compiled_in_verified_and_reported_as_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(listing("silu_by_tanh.py").splitlines()) <= 20
    recipe = tutorial(tmp_path, TINY, "silu_by_tanh")
    assert run(["compile", str(recipe), "-o", str(tmp_path / "build/own")]) == 0
    said = capfd.readouterr()
    text = re.sub(r"\d+\.\d s\b", "0.0 s", f"{said.err}{said.out}".replace(str(tmp_path), "…"))
    shown = re.sub(r"\d+\.\d s\b", "0.0 s", printed("infc compile model.yaml -o build/own"))
    assert " ".join(text.split()) == shown
    artifact = open_artifact(tmp_path / "build/own")
    report = json.loads((artifact.path / "report.json").read_text())
    (mine,) = (one for one in report["passes"] if one["name"] == "silu-by-tanh")
    (entry,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)
    assert {name: mine.pop(name) for name in json.loads(entry)} == json.loads(entry)
    assert mine.keys() == {"made", "ops"}
    program = parse_program((artifact.path / "program.ir").read_text())
    assert sum(node.op == "tanh" for node in program.nodes) == 6
    assert not any(node.op in ("silu", "gated_act") for node in program.nodes)
    assert "tanh" in (artifact.path / "code/step.cpp").read_text()
    with infc.LLM(artifact, threads=1) as llm:
        (answer,) = llm.generate([[1, 2, 3]], infc.SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 4


def test_the_wrong_one_is_caught_named_and_its_input_kept(tmp_path: Path) -> None:
    recipe = tutorial(tmp_path, TINY, "wrong_by_one_row")
    text = refused(recipe, tmp_path, "silu-wrong-once").replace(f"{tmp_path}/out", "build/wrong")
    text = text.replace(str(tmp_path), "…")
    shown = printed("infc compile model.yaml -o build/wrong").removeprefix("error: ")
    first, last = shown.split(" eliminate-dead-code, …,")
    first, last = f"{first} eliminate-dead-code", last.strip()
    assert text.startswith(first)
    assert text.endswith(last)


def test_the_cap_is_a_rewrite_with_an_option(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "cap_logits.py").write_text(listing("cap_logits.py"))
    recipe = write_recipe(tmp_path, checkpoint, {"cap_logits:CapLogits": {"cap": 20.0}})
    artifact = infc.compile(recipe, tmp_path / "out", overrides=["backend=reference"])
    report = json.loads((artifact.path / "report.json").read_text())
    mine = next(one for one in report["passes"] if one["name"] == "cap-logits")
    assert (mine["matches"], mine["options"], mine["near_misses"]) == (1, {"cap": 20.0}, [])
    assert mine["distance"]["kl"] > 0
    program = parse_program((artifact.path / "program.ir").read_text())
    assert [node.inputs[1] for node in program.nodes if node.op == "div"] == [20.0]


def test_the_shown_test_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silu_by_tanh.py").write_text(listing("silu_by_tanh.py"))
    monkeypatch.syspath_prepend(tmp_path)
    space: dict[str, Any] = {}
    exec(compile(listing("test_silu_by_tanh.py"), "test_silu_by_tanh.py", "exec"), space)
    space["test_silu_by_tanh"]()
    # It fails for the page's own wrong rewrite.
    exec(compile(listing("wrong_by_one_row.py"), "wrong_by_one_row.py", "exec"), space)
    with pytest.raises(PassError, match="worst in row 40 of 67"):
        space["test_silu_by_tanh"]()


def test_a_fault_by_position_is_caught_too(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "cosines_by_hand.py").write_text(BY_POSITION)
    passes = {"cosines_by_hand:SpellCosines": {"after": "fuse-rope"}}
    recipe = write_recipe(tmp_path, checkpoint, passes)
    text = refused(recipe, tmp_path, "spell-cosines")
    assert "position 41" in text


def test_the_same_cosines_without_the_fault_is_accepted(tmp_path: Path, checkpoint: Path) -> None:
    right = BY_POSITION.replace("cosines * 1.001", "cosines").replace(
        '"spell-cosines"', '"spell-right"'
    )
    (tmp_path / "cosines_rightly.py").write_text(right)
    passes = {"cosines_rightly:SpellCosines": {"after": "fuse-rope"}}
    recipe = write_recipe(tmp_path, checkpoint, passes)
    artifact = infc.compile(recipe, tmp_path / "out", overrides=["backend=reference"])
    report = json.loads((artifact.path / "report.json").read_text())
    assert next(p for p in report["passes"] if p["name"] == "spell-right")["matches"] == 1


def refused(recipe: Path, directory: Path, name: str) -> str:
    """The error of a compilation that must fail; checks what it names, and what it keeps."""
    with pytest.raises(PassError) as caught:
        infc.compile(recipe, directory / "out")
    text = str(caught.value)
    assert f"pass {name}" in text
    assert not (directory / "out").exists()
    (kept,) = (directory / "out.dumps").glob("*.ir")
    assert kept.name.endswith(f"-before-{name}.ir")
    assert str(kept) in text
    program = parse_program(kept.read_text())
    verify(program)
    assert program.nodes
    return text


def test_the_readme_shows_the_same_rewrite() -> None:
    readme = (ROOT / "README.md").read_text()
    _, _, body = listing("silu_by_tanh.py").partition("\n\n")
    assert body in readme
    assert listing("model.yaml") in readme
