"""Passes of a recipe: one of its own, such as cannot be, and where errors about them lie."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import infc
from infc.codegen.registry import get_backend
from infc.driver.optimize import build_recipe_pipeline
from infc.driver.recipe import load_recipe
from infc.ir.errors import UsageError
from infc.ir.targets import resolve_target

from .compiling import RECIPE, Lines


def test_a_pass_of_ones_own(source: Path, tmp_path: Path) -> None:
    """Found beside the recipe, run, reported, and never taken from the cache."""
    shutil.copytree(source, tmp_path / "mine")
    (tmp_path / "mine/my_passes_for_a_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from infc.passes.base import Pass, PassResult\n\n"
        "@dataclass(frozen=True)\n"
        "class CountNodes(Pass):\n"
        "    name: ClassVar[str] = 'count-nodes'\n"
        "    phase: ClassVar[str] = 'fuse'\n\n"
        "    def run(self, program, context):\n"
        "        return PassResult(program, near_misses=(str(len(program.nodes)),))\n"
    )
    progress = Lines()
    made = infc.compile(
        tmp_path / "mine/model.yaml",
        tmp_path / "a",
        overrides=["passes={'my_passes_for_a_test:CountNodes': {after: fuse-rope}}"],
        verify=False,
        progress=progress,
    )
    assert any("not cached: the recipe brings a pass of its own" in x for x in progress.lines)
    (idle,) = (line for line in progress.lines if "matched nothing" in line)
    assert re.fullmatch(r"count-nodes matched nothing \(near misses: \d+\)", idle)
    names = [e["name"] for e in json.loads((made.path / "report.json").read_text())["passes"]]
    assert names.index("count-nodes") == names.index("fuse-rope") + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["passes={fuse-rpe: false}"], "no pass fuse-rpe .did you mean 'fuse-rope'"),
        (["passes={fuse-rope: {colour: red}}"], "pass fuse-rope has no option colour"),
        (["passes={'nowhere:Pass': true}"], "cannot import nowhere"),
    ],
)
def test_passes_that_cannot_be(
    source: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        infc.compile(source / "model.yaml", tmp_path / "a", overrides=overrides)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("passes", "line", "message"),
    [
        ("\n  fuse-rope: true\n  fuse-rpe: false", 9, "no pass fuse-rpe"),
        ("\n  fuse-rope: {colour: red}", 8, "has no option colour"),
        ("\n  - merge-qkv\n  - gone_from_everywhere:Pass: {before: fuse-rope}", 9, "cannot import"),
        ("\n  fuse-rope: {before: fuse-rpe}", 8, "no pass fuse-rpe"),
        ("\n  squeeze-unit-batch: false", 7, "requires unit-batch-squeezed"),
        ("fuse-rope,fuse-rpe", 7, "unknown pass fuse-rpe"),
        ("\n  - merge-qkv\n  - 7", 9, "expected a name or a mapping"),
    ],
)
def test_errors_about_passes_say_the_line(
    source: Path, tmp_path: Path, passes: str, line: int, message: str
) -> None:
    recipe = tmp_path / "model.yaml"
    recipe.write_text(f"{RECIPE}passes: {passes}\nmodel: {source / 'checkpoint'}\n")
    recipe.write_text(recipe.read_text().replace("model: ./checkpoint\n", "\n"))
    with pytest.raises(UsageError, match=message) as caught:
        infc.compile(recipe, tmp_path / "a")
    assert caught.value.where == f"{recipe}:{line}"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_recipe_may_change_its_backend_alone(backend: str, tmp_path: Path) -> None:
    """The passes that it switches off or configures need not be those that the other wants."""
    path = tmp_path / "model.yaml"
    path.write_text("model: org/name\npasses: {group-loops: false, plan-memory: {}}\n")
    plan = get_backend(backend).plan_passes(resolve_target("x86-64-v3"))
    pipeline = build_recipe_pipeline(load_recipe(path, [f"backend={backend}"]), plan)
    assert "group-loops" not in pipeline.names()
    assert ("plan-memory" in pipeline.names()) == (backend == "cpp")

    path.write_text("model: org/name\npasses:\n  remove-no-op: {before: plan-memory}\n")
    loaded = load_recipe(path, [f"backend={backend}"])
    if backend == "cpp":
        assert build_recipe_pipeline(loaded, plan).names()[-2:] == ["remove-no-op", "plan-memory"]
        return
    with pytest.raises(UsageError, match=r"yaml:3.*the backend reference does not use it"):
        build_recipe_pipeline(loaded, plan)
