"""The tutorial's plug-in, installed as a package: found, tested, compiled in and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .generated import ROOT

EXAMPLE = ROOT / "examples/infc-threshold-gate"
PAGE = ROOT / "docs/plugins.md"
LISTING = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.M | re.S)


def test_the_page_shows_the_files_as_they_are(update_golden: bool) -> None:
    text = PAGE.read_text()
    if update_golden:
        shown = LISTING.sub(lambda m: m[0].replace(m[2], (EXAMPLE / m[1]).read_text()), text)
        PAGE.write_text(shown)
        return
    listings = dict(LISTING.findall(text))
    files = {p.relative_to(EXAMPLE).as_posix() for p in EXAMPLE.rglob("*.*") if p.is_file()}
    ignored = {name for name in files if "__pycache__" in name}
    assert listings.keys() == files - ignored
    for name, body in listings.items():
        assert body == (EXAMPLE / name).read_text(), name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the example was installed into."""
    directory = tmp_path_factory.mktemp("plugin")
    source, target = directory / "source", directory / "site"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        "--target",
        str(target),
    ]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return target


def run(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python command with the example installed."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_own_tests_pass(site: Path) -> None:
    tests = str(site.parent / "source/tests")
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


@pytest.mark.slow
def test_it_is_found_by_name_compiled_in_and_served_without_it(site: Path) -> None:
    recipe, output = str(ROOT / "recipes/tiny/model.yaml"), site.parent / "sparse"
    chosen = ["--set", "passes={threshold-gate: {threshold: 0.02}}"]
    done = run(site, "-m", "infc", "compile", recipe, "-o", str(output), *chosen)
    assert done.returncode == 0, done.stderr
    assert "not cached" in done.stderr
    report = json.loads((output / "report.json").read_text())
    (mine,) = (one for one in report["passes"] if one["name"] == "threshold-gate")
    layers = json.loads((output / "manifest.json").read_text())["model"]["num_layers"]
    assert mine["matches"] == layers
    assert "distinct" in mine["verified"]
    assert (output / "code/extensions/threshold_gate.hpp").is_file()
    # A serving machine has the artifact, not the plug-in.
    words = [str(output), "def main(", "--max-tokens", "8", "--temperature", "0"]
    served = run(Path("/nonexistent"), "-m", "infc", "generate", *words)
    assert served.returncode == 0, served.stderr
    assert served.stdout.strip()
    read = run(Path("/nonexistent"), "-m", "infc", "inspect", str(output))
    assert (read.returncode, "unknown op" in read.stderr) == (4, True), read.stderr


def test_without_it_the_name_is_unknown_and_a_broken_one_is_named(site: Path) -> None:
    done = run(site, "-m", "infc", "passes", "threshold-gate", INFC_PLUGINS="0")
    assert done.returncode != 0
    assert "unknown pass threshold-gate" in done.stderr
    broken = site.parent / "broken"
    shutil.copytree(site, broken)
    (broken / "infc_threshold_gate/__init__.py").write_text("import no_such_module\n")
    done = run(broken, "-m", "infc", "passes", "threshold-gate")
    assert done.returncode != 0
    assert "plug-in threshold-gate of infc-threshold-gate 0.1.0 cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
