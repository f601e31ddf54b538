"""The wheel: what is in it, and that it serves, alone, where there is neither torch nor a clone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from packaging.requirements import Requirement

import infc
from infc.driver.cli import infc as infc_group

from .runtime.small_artifact import write_small_artifact
from .test_layout import ROOMS, ROOT, files_in

IN_THE_TREE = ("MANIFEST.in", "pyproject.toml", "setup.py", "README.md", "LICENSE", "src")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as a clone has them, to build from."""
    copy = tmp_path_factory.mktemp("tree") / "infc"
    copy.mkdir()
    for name in (*IN_THE_TREE, *sorted(ROOMS)):
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skipped)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(source: Path, place: Path) -> Path:
    """Builds as `pip wheel SOURCE` does, without looking for build tools elsewhere."""
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(place), str(source)], check=True)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tree."""
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The files in the wheel."""
    return set(zipfile.ZipFile(wheel).namelist())


def test_it_installs_infc_alone(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"infc"}


def test_it_carries_every_module(names: set[str]) -> None:
    packages = {p.parent for p in files_in(*ROOMS, suffix="__init__.py")}
    modules = [p for p in files_in(*ROOMS, suffix=".py") if p.parts[0] != "recipes"]
    assert [str(p.parent) for p in modules if p.parent not in packages] == []
    assert [str(p) for p in modules if f"infc/{p.as_posix()}" not in names] == []


@pytest.mark.parametrize("suffix", [".hpp", ".yaml", ".safetensors", ".css", ".js"])
def test_it_carries_what_is_not_python(names: set[str], suffix: str) -> None:
    found = files_in("codegen", "driver", "recipes", suffix=suffix)
    data = [p for p in found if ".train" not in p.parts]
    assert data, f"no {suffix} file in the tree"
    assert [str(p) for p in data if f"infc/{p.as_posix()}" not in names] == []
    assert "infc/py.typed" in names
    texts = {p.relative_to(ROOT) for p in (ROOT / "recipes/texts").glob("*/*")}
    assert len(texts) > 10
    assert [str(p) for p in texts if f"infc/{p.as_posix()}" not in names] == []


def test_building_leaves_no_build_folder(tree: Path, wheel: Path) -> None:
    # What stays in build/lib is packed into the next wheel, long after it was removed.
    assert not (tree / "build").exists()


def test_a_source_distribution_gives_the_same_wheel(
    tree: Path, names: set[str], tmp_path: Path
) -> None:
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    (packed,) = tmp_path.glob("*.tar.gz")
    again = build_wheel(packed, tmp_path / "again")
    assert set(zipfile.ZipFile(again).namelist()) == names


def test_images_are_built_from_what_the_wheel_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert kept == {*IN_THE_TREE, *ROOMS, "constraints.txt"}


def test_deployment_files_call_commands_as_they_are() -> None:
    compose = yaml.safe_load((ROOT / "recipes/deploy/compose.yaml").read_text())
    images = re.findall(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    called = [compose["services"]["infc"]["command"], *map(json.loads, images)]
    assert len(called) == 3
    for words in called:
        parser = infc_group.get_command(click.Context(infc_group), words[0])
        command = parser or infc_group
        options = {opt for p in command.params for opt in p.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= options


def closure(requirements: list[str]) -> set[str]:
    """The distributions that these ask for, without extras, and those that they ask for in turn."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        needed = waiting.pop()
        name = re.sub(r"[-_.]+", "-", needed.name).lower()
        if name not in found and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += [Requirement(text) for text in importlib.metadata.requires(name) or ()]
    return found


@pytest.fixture(scope="module")
def machine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel and what it declares, and nothing else.

    The dependencies are linked from here: no network, and none that is not declared.
    """
    place = tmp_path_factory.mktemp("machine")
    venv.create(place, symlinks=True)
    command = [*PIP, "--python", str(place / "bin/python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", str(wheel)], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    (metadata,) = site.glob("infc-*.dist-info/METADATA")
    declared = importlib.metadata.PathDistribution(metadata.parent).requires or []
    for name in closure(declared):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return place / "bin"


@pytest.fixture(scope="module")
def artifact(machine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model bundled in the wheel, compiled by the environment that runs the tests."""
    (recipe,) = machine.parent.glob("lib/python*/site-packages/infc/recipes/tiny/model.yaml")
    output = tmp_path_factory.mktemp("bundled") / "tiny.infc"
    return infc.compile(recipe, output, verify=False, cache=False).path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a process of that machine: nothing leads to the clone or the user's cache."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def run_there(
    machine: Path, environment: dict[str, str], place: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    command = [str(machine / "infc"), *map(str, arguments)]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


@contextlib.contextmanager
def serving(machine: Path, environment: dict[str, str], artifact: Path) -> Iterator[str]:
    command = [str(machine / "infc"), "serve", str(artifact), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=artifact.parent, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), line
        yield line.split()[3]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_without_torch_it_serves_the_bundled_model(
    machine: Path, environment: dict[str, str], artifact: Path
) -> None:
    look = "import infc, sys; print(infc.__file__); import torch"
    looked = subprocess.run(
        [str(machine / "python"), "-c", look], env=environment, capture_output=True, text=True
    )
    assert looked.stdout.startswith(str(machine.parent))
    assert "No module named 'torch'" in looked.stderr

    prompt = "def read_lines(path):"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    with serving(machine, environment, artifact) as url:
        asked = urllib.request.Request(
            f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:
            text = json.load(answer)["choices"][0]["text"]
    params = infc.SamplingParams(max_tokens=12, temperature=0)
    with infc.LLM(artifact) as llm:
        assert text == llm.generate([prompt], params)[0].outputs[0].text


@pytest.mark.parametrize("command", ["compile", "generate"])
def test_without_torch_what_needs_it_says_how_to_get_it(
    command: str, machine: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    arguments: tuple[object, ...] = ("compile", tmp_path / "model.yaml")
    (tmp_path / "model.yaml").write_text("model: .\n")
    if command == "generate":
        arguments = ("generate", write_small_artifact(tmp_path / "reference.infc"), "word")
    before = sorted(os.listdir(tmp_path))
    done = run_there(machine, environment, tmp_path, *arguments)
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert "needs torch, which is not installed (pip install 'infc[compile]')" in done.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_bundled_recipes_are_known_by_name(
    machine: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    listed = run_there(machine, environment, tmp_path, "recipe", "list")
    assert listed.returncode == 0, listed.stderr
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")} | {"tiny"}
    assert {line.split()[0] for line in listed.stdout.splitlines()} == names
    shown = run_there(machine, environment, tmp_path, "recipe", "show", "qwen3-0.6b")
    assert yaml.safe_load(shown.stdout)["model"] == "Qwen/Qwen3-0.6B"
    done = run_there(machine, environment, tmp_path, "run", "tiny", "x")
    assert done.returncode == 5
    assert "is not an artifact, and compiling it needs torch" in done.stderr


def test_without_torch_doctor_finds_no_fault(
    machine: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run_there(machine, environment, tmp_path, "doctor")
    assert done.returncode == 0, done.stdout
    assert "pip install 'infc[compile]'" in done.stdout


def test_without_torch_it_rebuilds_for_another_processor(
    machine: Path, environment: dict[str, str], artifact: Path, tmp_path: Path
) -> None:
    command = ("rebuild", artifact, "--target", "x86-64-v2", "-o", tmp_path / "v2.infc")
    done = run_there(machine, environment, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    asked = ("generate", tmp_path / "v2.infc", "def read_lines(path):", "--max-tokens", "8")
    answers = [run_there(machine, environment, tmp_path, *asked, "--temperature", "0")]
    answers.append(run_there(machine, environment, tmp_path, asked[0], artifact, *asked[2:]))
    assert answers[0].stdout == answers[1].stdout != ""
