"""A backend of an installed package: found by name, compiled with, run, and told apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).with_name("toy_backend.py")
SHIFT = 3
FIRST_TOKEN = """
import sys, infc
params = infc.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
with infc.LLM(sys.argv[1]) as llm:
    (answer,) = llm.generate([[5, 7, 11]], params)
print(*answer.outputs[0].token_ids)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages as pip leaves it: the module, and what it declares."""
    place = tmp_path_factory.mktemp("site")
    shutil.copy(TOY, place / "infc_toy.py")
    info = place / "infc_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: infc-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[infc.plugins]\ntoy = infc_toy:register\n")
    return place


def python(site: Path | None, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)} if site else dict(os.environ)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def compiled(site: Path, source: Path, output: Path, *overrides: str) -> str:
    """What compiling said; the artifact is at `output`."""
    sets = [word for one in overrides for word in ("--set", one)]
    recipe = source / "model.yaml"
    done = python(site, "-m", "infc", "compile", recipe, "-o", output, "--no-verify", *sets)
    assert done.returncode == 0, done.stderr
    return done.stderr


def first_token(site: Path | None, artifact: Path) -> int:
    done = python(site, "-c", FIRST_TOKEN, artifact)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_it_compiles_and_runs(site: Path, source: Path, tmp_path: Path) -> None:
    said = compiled(site, source, tmp_path / "toy", "backend=toy", f"toy.shift={SHIFT}")
    assert "not cached: toy is the backend of a plug-in" in said
    manifest = json.loads((tmp_path / "toy/manifest.json").read_text())
    assert manifest["backend"] == "toy"
    assert manifest["programs"]["main"]["entry"] == {
        "abi": None,
        "file": "toy/step.txt",
        "kind": "toy-text",
    }
    assert manifest["recipe"]["toy"] == {"shift": SHIFT}
    report = json.loads((tmp_path / "toy/report.json").read_text())
    assert report["passes"][-1]["name"] == "toy-count"
    assert "toy_nodes" in (tmp_path / "toy/program.ir").read_text()

    compiled(site, source, tmp_path / "plain", "backend=reference")
    plain = json.loads((tmp_path / "plain/manifest.json").read_text())
    assert "toy" not in plain["recipe"]
    expected = first_token(site, tmp_path / "plain") + SHIFT
    assert first_token(site, tmp_path / "toy") == expected % manifest["model"]["vocab_size"]

    # Without the package, the artifact can be looked into, and not run.
    done = python(None, "-m", "infc", "inspect", tmp_path / "toy", "--json")
    assert done.returncode == 0, done.stderr
    done = python(None, "-c", FIRST_TOKEN, tmp_path / "toy")
    assert "this infc has no executor for backend 'toy'" in done.stderr
    assert "it runs cpp and reference" in done.stderr


def test_the_doctor_lists_it_and_the_recipe_has_its_section(site: Path) -> None:
    done = python(site, "-m", "infc", "doctor", "--json")
    found = {one["subject"]: one for one in json.loads(done.stdout)["findings"]}
    assert found["backend toy"]["detail"] == "compiles and runs artifacts"
    assert found["backend cpp"]["fine"]
    done = python(site, "-m", "infc", "recipe", "show", "tiny", "--set", "backend=toy")
    assert "toy:\n  shift: 0\n" in done.stdout, done.stderr
    assert "toy" not in python(site, "-m", "infc", "recipe", "show", "tiny").stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["backend=toi"],
            "backend cannot be 'toi' (choose 'cpp', 'reference', 'triton', 'onnx', 'tensorrt' or"
            " 'toy')",
        ),
        (["backend=toy", "toy.shft=1"], "unknown key 'toy.shft' (did you mean 'toy.shift'?)"),
        (["backend=toy", "toy.shift=far"], "toy.shift cannot be 'far': "),
        (["backend=toy", "toy=7"], "toy cannot be 7: expected a mapping"),
        (["toy.shift=1"], "unknown key 'toy'"),
    ],
)
def test_what_a_recipe_cannot_say(site: Path, overrides: list[str], message: str) -> None:
    sets = [word for one in overrides for word in ("--set", one)]
    done = python(site, "-m", "infc", "recipe", "show", "tiny", *sets)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_one_that_does_not_load_says_so(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "broken")
    (tmp_path / "broken/infc_toy.py").write_text("import no_such_module\n")
    asked = ["-m", "infc", "recipe", "show", "tiny", "--set", "backend=toy"]
    done = python(tmp_path / "broken", *asked)
    assert "plug-in toy of infc-toy 1.0 cannot be loaded" in done.stderr
    done = python(tmp_path / "broken", "-m", "infc", "doctor", "--json")
    found = {one["subject"]: one for one in json.loads(done.stdout)["findings"]}
    assert "no_such_module" in found["plug-ins"]["detail"]
    assert found["backend cpp"]["fine"]
